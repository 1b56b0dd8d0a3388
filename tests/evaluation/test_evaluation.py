"""The evaluation on a posterior that is known exactly: it says yes to it, no to the prior, and its numbers are the closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig, RunConfig
from diffusion_rtb.evaluation.evaluate import evaluate_run, show
from diffusion_rtb.evaluation.metric import metrics_of
from diffusion_rtb.evaluation.samples import draw
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import PixelPrior, Signs, end_variance, green, set_known_posterior

BETA = 1.2
PROMPTS = ["one", "two"]
FACTORS = {"name": "sign", "classes": ["negative", "positive"]}
CONFIG = EvalConfig.model_validate(
    {"labeller": {"component": "tests.oracles.pixel:Signs"}, "factors": [FACTORS], "bootstrap": 300, "batch": 100}
)
METRICS = metrics_of([describe(metric, "metric") for metric in EvalConfig().metrics])
V = end_variance(PixelPrior())


def numbers(*, known: bool) -> dict[str, Any]:
    """The evaluation of the exact posterior, or of an untrained one."""
    prior = PixelPrior()
    if known:
        set_known_posterior(prior, BETA)
    sampler = Sampler(prior, green, PROMPTS, 100)
    tools: dict[str, Any] = {"embedder": Signs(), "labeller": Signs()}
    before, _ = draw(sampler, CONFIG, 400, 0, posterior=False, **tools)
    after, _ = draw(sampler, CONFIG, 300, 0, posterior=True, **tools)
    return summarise(before, after, PROMPTS, BETA, CONFIG, METRICS)


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    return numbers(known=True)


@pytest.fixture(scope="module")
def untrained() -> dict[str, Any]:
    return numbers(known=False)


def test_the_exact_posterior_has_the_closed_form_numbers(exact: dict[str, Any]) -> None:
    log_z = BETA**2 * V / 2
    overall = exact["overall"]
    assert overall["elbo"] == pytest.approx(log_z, abs=0.01)  # log w is nearly constant at the posterior
    assert overall["log_z"]["from_posterior"] == pytest.approx(log_z, abs=0.01)
    assert overall["ess"]["posterior"] > 0.99
    # 800 and 600 samples: standard errors of 0.03 in the reward, 0.04 in KL and in the prior's log Z.
    assert overall["kl"]["mean"] == pytest.approx(log_z, abs=0.12)
    assert overall["kl"]["reweighted_prior"]["mean"] == pytest.approx(log_z, abs=0.12)
    # Prior and posterior start from the same x_T, which tells 0.4 % of x_0 in this short chain.
    assert overall["strength"]["slope"]["mean"] == pytest.approx(1.0, abs=0.01)
    assert overall["strength"]["r2"] == pytest.approx(1.0, abs=0.01)
    assert overall["bill"]["paid"] == pytest.approx(log_z, abs=0.12)
    assert overall["bill"]["rest"] == pytest.approx(0.0, abs=0.12)
    assert overall["log_z"]["from_prior"] == pytest.approx(log_z, abs=0.12)
    assert overall["reward"]["posterior"]["mean"] == pytest.approx(BETA * V, abs=0.1)
    assert overall["reward"]["reweighted_prior"]["mean"] == pytest.approx(BETA * V, abs=0.15)
    assert overall["reward"]["rise_in_prior_std"] == pytest.approx(BETA * V / math.sqrt(V), abs=0.2)
    assert sum(overall["kl_profile"]) == pytest.approx(overall["kl"]["mean"], rel=1e-6)


def test_the_check_passes_the_posterior_and_fails_the_prior(exact: dict[str, Any], untrained: dict[str, Any]) -> None:
    good, bad = exact["posterior_check"][0], untrained["posterior_check"][0]
    positive = 0.5 * (1 + math.erf(BETA * math.sqrt(V) / math.sqrt(2)))  # P(N(beta·v, v) > 0)
    assert good["passed"]
    assert good["posterior"][1] == pytest.approx(positive, abs=0.06)
    assert good["reweighted"][1] == pytest.approx(positive, abs=0.06)
    assert not bad["passed"]
    assert bad["tv"]["mean"] == pytest.approx(positive - 0.5, abs=0.08)
    assert bad["p_value"] < 0.01


def test_an_untrained_posterior_equals_the_prior_sample_by_sample(untrained: dict[str, Any]) -> None:
    overall = untrained["overall"]
    assert overall["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert overall["diversity"]["prior"] == overall["diversity"]["posterior"]


def test_the_terminal_shows_every_prompt_and_the_verdict(exact: dict[str, Any], untrained: dict[str, Any]) -> None:
    console = Console(width=80, record=True, quiet=False, file=None)
    with console.capture() as captured:
        show(exact, METRICS, console)
        show(untrained, METRICS, console)
    text = captured.get()
    assert "one" in text
    assert "two" in text
    assert "within the tolerance" in text
    row = text[text.index("re-weighted prior") :].splitlines()[0]
    assert f"{exact['overall']['kl']['reweighted_prior']['mean']:.2f}" in row
    assert "ESS " in text
    assert "NOT within" in text
    assert max(len(line) for line in text.splitlines() if line.startswith(("│", "┃"))) <= 80


def pixel_run(out: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "pixel",
            "out": str(out),
            "prior": {"component": "tests.oracles.pixel:PixelPrior"},
            "reward": {"component": "tests.oracles.pixel:green"},
            "beta": BETA,
            "prompts": {"list": PROMPTS},
            "train": {
                "iterations": 2,
                "prompts_per_iteration": 2,
                "group": 4,
                "micro_batch": 8,
                "grid_every": 0,
            },
            "eval": CONFIG.model_dump() | {"samples": 6, "prior_samples": 12, "batch": 5, "bootstrap": 50},
        }
    )


def test_the_command_writes_the_same_file_twice(tmp_path: Path) -> None:
    assemble(pixel_run(tmp_path)).fit()
    evaluate_run(tmp_path / "pixel")
    first = (tmp_path / "pixel" / "eval" / "metrics.json").read_bytes()
    evaluate_run(tmp_path / "pixel", ["eval.batch=12"])  # batch size is memory, not results
    second = (tmp_path / "pixel" / "eval" / "metrics.json").read_bytes()
    assert json.loads(first)["samples"] == {"prior": 12, "posterior": 6}
    assert first == second
    assert (tmp_path / "pixel" / "eval" / "side_by_side.png").stat().st_size > 1000
    assert (tmp_path / "pixel" / "lora" / "card.md").exists()


@pytest.mark.parametrize("wrong", ["nothing", "no_checkpoint"])
def test_folders_without_a_posterior_are_refused(tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if wrong == "no_checkpoint":
        trainer = assemble(pixel_run(tmp_path))
        folder = trainer.folder
    with pytest.raises(ValueError, match="checkpoint" if wrong == "no_checkpoint" else "config"):
        evaluate_run(folder)


def test_samples_do_not_depend_on_the_batch() -> None:
    sampler = Sampler(PixelPrior(), green, PROMPTS, 7)
    other = Sampler(PixelPrior(), green, PROMPTS, 50)
    a, _ = draw(sampler, EvalConfig(), 9, 3, posterior=False)
    b, _ = draw(other, EvalConfig(), 9, 3, posterior=False)
    torch.testing.assert_close(a.reward, b.reward, rtol=1e-5, atol=1e-5)
