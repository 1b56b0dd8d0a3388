"""`make gpu-check` says what it found: the card, every check, and that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_check import NO_CARD, Outcomes, main, table

MACHINE = {"name": "Card", "driver": "580.1", "cuda": "13.0", "torch": "2.11", "diffusers": "0.42"}


def report(name: str, outcome: str, when: str = "call", why: str | None = None) -> pytest.TestReport:
    return pytest.TestReport(name, (name, 0, name), {}, outcome, why, when, duration=1.5)  # type: ignore[arg-type]


def test_every_check_is_in_the_table_once_with_the_reason_why_not() -> None:
    outcomes = Outcomes()
    outcomes.pytest_runtest_logreport(report("tests/a.py::one", "passed", "setup"))
    outcomes.pytest_runtest_logreport(report("tests/a.py::one", "passed"))
    outcomes.pytest_runtest_logreport(report("tests/a.py::one", "passed", "teardown"))
    outcomes.pytest_runtest_logreport(report("tests/a.py::two", "failed", why="a trace\nAssertionError: 1 != 2"))
    outcomes.pytest_runtest_logreport(report("tests/a.py::three", "failed", "setup", "out of memory"))
    lines = table(MACHINE, outcomes.checks).splitlines()
    assert lines == [
        "Card, driver 580.1, CUDA 13.0, torch 2.11, diffusers 0.42",
        "",
        "passed       1.5 s  a.py::one",
        "failed       1.5 s  a.py::two",
        "                    AssertionError: 1 != 2",
        "failed       1.5 s  a.py::three",
        "                    out of memory",
        "",
        "1 of 3 passed",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a card")
def test_without_a_card_it_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path / "out") == 1
    assert capsys.readouterr().err == f"{NO_CARD}\n"
    assert not (tmp_path / "out").exists()
