"""The table of every scheduler in docs/samplers.md is what happens when each is tried."""

from __future__ import annotations

from importlib.util import find_spec

import diffusers
import pytest

from tests.oracles.scheduler_table import BEGIN, END, NEEDS, NOT_OURS, PAGE, names, row

PRESENT = {name for package, users in NEEDS.items() if find_spec(package) for name in users}
"""Those whose rows say that a package is missing, which here it is not."""


def written() -> dict[str, str]:
    """The rows of the page by scheduler."""
    rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {line.split("`")[1]: line for line in rows}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(names()) - PRESENT))
def test_the_row_of_every_scheduler_is_what_happens(name: str) -> None:
    rows = written()
    if name not in rows and f"diffusers {diffusers.__version__};" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("this version of diffusers has a scheduler that the page's version had not")
    assert rows[name] == row(name), "python -m tests.measurements.scheduler_table"


def test_the_table_has_all_of_them_and_every_verdict() -> None:
    rows = written()
    assert len(rows) > 40
    assert set(NOT_OURS) <= set(rows)
    for verdict in (
        "| exact | yes |",
        "| exact | own loop |",
        "| exact | refused: another",
        "| refused: ",
        "not applicable",
    ):
        assert any(verdict in line for line in rows.values()), verdict
