"""Write the table of every scheduler that diffusers exports into docs/samplers.md.

python -m tests.measurements.scheduler_table
"""

from __future__ import annotations

from tests.oracles.scheduler_table import PAGE, page_with, table


def main() -> None:
    """Replace the table in the page."""
    PAGE.write_text(page_with(table()), encoding="utf-8")


if __name__ == "__main__":
    main()
