"""`make gpu-check` says what it found: the card, every check, and that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_check import NO_CARD, ROOT, Outcomes, main, marked, table

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


def test_a_file_that_cannot_be_imported_is_a_check_that_failed() -> None:
    outcomes = Outcomes()
    why = "a trace\nModuleNotFoundError: No module named 'ot'"
    outcomes.pytest_collectreport(pytest.CollectReport("tests/a.py", "failed", why, None))
    outcomes.pytest_collectreport(pytest.CollectReport("tests/b.py", "passed", None, []))
    assert [check["error"] for check in outcomes.checks] == ["ModuleNotFoundError: No module named 'ot'"]


def test_files_with_something_for_a_card_are_found() -> None:
    found = {str(file.relative_to(ROOT / "tests")) for file in marked()}
    assert {"gpu/test_small_runs.py", "rewards/test_rewards.py", "reward_check/test_check_reward.py"} <= found


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a card")
def test_without_a_card_it_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path / "out") == 1
    assert capsys.readouterr().err == f"{NO_CARD}\n"
    assert not (tmp_path / "out").exists()
