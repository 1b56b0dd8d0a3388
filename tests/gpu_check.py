"""`make gpu-check`: every test that is marked `gpu`, on the card that is here, with a table and a JSON file of what passed.

python -m tests.gpu_check [OUT]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from diffusion_rtb.benchmark.device import describe_machine
from diffusion_rtb.files.whole import write_json

ROOT = Path(__file__).parents[1]
OUT = Path("runs/gpu-check")
NO_CARD = (
    "There is no CUDA device here, so nothing was checked: give the command on a machine with a card that torch sees."
)


class Outcomes:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is its call, or its set-up or clean-up where that did not pass."""
        if report.when == "call" or not report.passed:
            error = str(report.longreprtext).strip().splitlines()[-1:] if report.failed else []
            self._keep(report.nodeid, report.outcome, report.duration, "".join(error))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported, for want of a package, say."""
        if report.failed:
            self._keep(report.nodeid, "failed", 0.0, "".join(str(report.longreprtext).strip().splitlines()[-1:]))

    def _keep(self, test: str, outcome: str, seconds: float, error: str) -> None:
        self.checks.append({"test": test, "outcome": outcome, "seconds": seconds, "error": error})


def marked() -> list[Path]:
    """The files that have a test for a card: the others are not even imported."""
    return [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]


def table(machine: dict[str, Any], checks: list[dict[str, Any]]) -> str:
    """The card and one line per check."""
    driver = f"driver {machine.get('driver')}, CUDA {machine.get('cuda')}"
    lines = [f"{machine['name']}, {driver}, torch {machine['torch']}, diffusers {machine['diffusers']}", ""]
    for check in checks:
        reason = f"\n{'':20}{check['error']}" if check["error"] else ""
        lines.append(f"{check['outcome']:8} {check['seconds']:7.1f} s  {check['test'].removeprefix('tests/')}{reason}")
    passed = sum(check["outcome"] == "passed" for check in checks)
    return "\n".join([*lines, "", f"{passed} of {len(checks)} passed"]) + "\n"


def main(out: Path = OUT) -> int:
    """Exit code 0 where there is a card and all passed."""
    if not torch.cuda.is_available():
        sys.stderr.write(f"{NO_CARD}\n")
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    outcomes, start = Outcomes(), perf_counter()
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*options, *map(str, marked())], plugins=[outcomes])
    machine = describe_machine(torch.device("cuda"))
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "seconds": perf_counter() - start, "checks": outcomes.checks}
    write_json(out / "gpu_check.json", content)
    sys.stdout.write(f"\n{table(machine, outcomes.checks)}All of it is in {out / 'gpu_check.json'}.\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*(Path(argument) for argument in sys.argv[1:2])))
