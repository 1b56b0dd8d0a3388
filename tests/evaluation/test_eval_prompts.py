"""An evaluation of any number of prompts: a subset is the same numbers, and terminal, pictures and memory stay bounded."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffusion_rtb.config.load import ConfigError, EvalConfig, RunConfig, load_config
from diffusion_rtb.evaluation.choice import LISTED, PICTURED, evaluated_rows, listed, spread
from diffusion_rtb.evaluation.evaluate import evaluate_run, evaluate_subject
from diffusion_rtb.evaluation.samples import draw
from diffusion_rtb.evaluation.subject import Options
from diffusion_rtb.evaluation.subjects.run import RunSubject
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble
from tests.config.test_prompts import run_file
from tests.oracles.pixel import PixelPrior, green

COUNT = 60
NAMES = [f"prompt number {i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("many")
    assemble(RunConfig.model_validate(settings(out, NAMES))).fit()
    return out / "many"


def settings(out: Path, prompts: list[str]) -> dict[str, Any]:
    return {
        "name": "many", "out": str(out), "beta": 1.0,
        "prior": {"component": "tests.oracles.pixel:PixelPrior"}, "reward": {"component": "tests.oracles.pixel:green"},
        "prompts": {"list": prompts},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
        "eval": {"samples": 2, "prior_samples": 3, "bootstrap": 5},
    }  # fmt: skip


@pytest.fixture(scope="module")
def everything(run: Path) -> dict[str, Any]:
    return evaluate_run(run)


def test_terminal_and_pictures_are_bounded_and_the_file_has_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = evaluate_run(run)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 2 * LISTED + 45  # two tables of prompts, and what is said of all
    assert f"Of {COUNT} prompts the tables show the 10 whose reward rose most and the 10" in shown.replace("\n", " ")
    written = json.loads((run / "eval/metrics.json").read_text())
    assert [row["prompt"] for row in written["per_prompt"]] == NAMES
    ranked = listed(numbers["per_prompt"])
    rises = [row["reward"]["posterior"]["mean"] - row["reward"]["prior"]["mean"] for row in ranked]
    every = sorted(r["reward"]["posterior"]["mean"] - r["reward"]["prior"]["mean"] for r in numbers["per_prompt"])
    assert sorted(rises) == every[:10] + every[-10:]
    with Image.open(run / "eval/side_by_side.png") as picture:
        assert picture.height < 250 * PICTURED


@pytest.mark.parametrize("wanted", ["7", "[prompt number 50, prompt number 3]"])
def test_a_subset_has_the_numbers_that_its_prompts_have_in_the_whole(
    run: Path, everything: dict[str, Any], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    part = evaluate_run(run, [f"eval.prompts={wanted}"])
    rows = [r * COUNT // 7 for r in range(7)] if wanted == "7" else [3, 50]
    assert [row["prompt"] for row in part["per_prompt"]] == [NAMES[row] for row in rows]
    for row, found in zip(rows, part["per_prompt"], strict=True):
        assert found["reward"]["posterior"]["mean"] == everything["per_prompt"][row]["reward"]["posterior"]["mean"]
        assert found["log_z"] == everything["per_prompt"][row]["log_z"]
    assert f"Evaluated are {len(rows)} of the run's {COUNT} prompts" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("61", "eval.prompts is 61: the run has 60 prompts"),
        ("[prompt numbr 7]", "no prompt 'prompt numbr 7'. Did you mean 'prompt number 7'?"),
    ],
)
def test_what_the_run_does_not_have_is_refused(run: Path, wanted: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("?", r"\?")):
        evaluate_run(run, [f"eval.prompts={wanted}"])


@pytest.mark.parametrize("wanted", ["0", "-1", "[]", "[1]", "true", "1.5"])
def test_other_values_are_no_choice(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.prompts"):
        load_config(run_file(tmp_path, "list: [a]"), [f"eval.prompts={wanted}"])


UNSEEN = ["something else", "a thing of another kind"]


@pytest.fixture
def unseen(run: Path, tmp_path: Path) -> dict[str, Any]:
    return evaluate_subject(RunSubject(run, Options([f"eval.unseen={json.dumps(UNSEEN)}"], out=tmp_path / "unseen")))


def test_unseen_prompts_take_the_place_of_the_runs(run: Path, unseen: dict[str, Any], tmp_path: Path) -> None:
    """The prior's side is that of a run of these prompts; the posterior's is this run's, with its log-densities."""
    own = settings(tmp_path, UNSEEN)
    assemble(RunConfig.model_validate(own)).fit()
    theirs = evaluate_run(tmp_path / "many")
    assert [row["prompt"] for row in unseen["per_prompt"]] == UNSEEN
    for found, expected in zip(unseen["per_prompt"], theirs["per_prompt"], strict=True):
        assert found["reward"]["prior"]["mean"] == expected["reward"]["prior"]["mean"]
        assert found["log_z"]["from_prior"] == expected["log_z"]["from_prior"]
        assert found["reward"]["posterior"]["mean"] != found["reward"]["prior"]["mean"]


def test_unseen_prompts_leave_the_evaluation_and_the_card_of_a_run(
    run: Path, everything: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [*(run / "eval").iterdir(), *run.glob("posterior*/*")]
    before = {file: file.read_bytes() for file in kept if file.is_file()}
    assert before
    evaluate_run(run, [f"eval.unseen={json.dumps(UNSEEN)}"])
    assert (run / "unseen/metrics.json").is_file()
    assert {file: file.read_bytes() for file in before} == before
    assert "Evaluated are 2 prompts that the run was not trained on" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            ["eval.unseen=[prompt number 7]"],
            "'prompt number 7' is a prompt of the run; take it out, or use eval.prompts",
        ),
        (["eval.unseen=[a, b, a]"], "the prompt 'a' is given more than once"),
        (["eval.unseen=[]"], "at least 1"),
        (["eval.unseen=[a]", "eval.prompts=3"], "give one of them"),
    ],
)
def test_what_is_no_unseen_prompt_is_refused(run: Path, given: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        evaluate_run(run, given)


def test_a_reward_is_asked_about_unseen_prompts(run: Path) -> None:
    with pytest.raises(ValueError, match=r"does not take the 2 prompts: prompts must be short, got 'longer'"):
        evaluate_run(
            run, ["eval.unseen=[a, longer]", "eval.judges=[{component: tests.evaluation.test_eval_prompts:Short}]"]
        )


class Short:
    """A judge of prompts of one letter."""

    @staticmethod
    def check_prompts(prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        long = next((prompt for prompt in prompts if len(prompt) > 1), None)
        if long is not None:
            raise ValueError(f"prompts must be short, got {long!r}")

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.flatten(1).mean(1)


@given(total=st.integers(1, 500), count=st.integers(1, 500))
def test_a_spread_is_even(total: int, count: int) -> None:
    rows = spread(total, count)
    assert len(rows) == len(set(rows)) == min(total, count)
    assert rows[0] == 0
    assert rows[-1] < total
    gaps = {b - a for a, b in pairwise(rows)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert count > total or evaluated_rows(count, ["x"] * total) == rows


def test_kept_pictures_are_bounded() -> None:
    _, pictured = draw(Sampler(PixelPrior(), green, NAMES, 50), EvalConfig(), 6, 0, posterior=False)
    assert len(pictured.image) == len(pictured.reward) == 4 * PICTURED
    _, few = draw(Sampler(PixelPrior(), green, NAMES[:3], 50), EvalConfig(), 6, 0, posterior=False)
    assert len(few) == 4 * 3
