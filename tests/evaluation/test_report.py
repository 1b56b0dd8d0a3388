"""What the evaluation says when there is little to say: single samples, no embedder, tools without the needed method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig, RunConfig
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.evaluation.metric import metrics_of
from diffusion_rtb.evaluation.samples import Drawn, draw
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.evaluation.terminal import show
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import PixelPrior, Signs, green

FACTOR = {"name": "sign", "classes": ["negative", "positive"]}
METRICS = metrics_of([describe(metric, "metric") for metric in EvalConfig().metrics])
EMBEDDED = EvalConfig.model_validate({"embedder": {"component": "tests.oracles.pixel:Signs"}, "bootstrap": 20})


def drawn(rewards: list[float], embedding: torch.Tensor | None = None) -> Drawn:
    """Samples of one prompt whose transitions are the prior's."""
    n = len(rewards)
    zero = torch.zeros(n, 2)
    return Drawn(torch.zeros(n, dtype=torch.long), torch.tensor(rewards), zero, zero, embedding)


def test_one_sample_has_no_spread_and_no_diversity() -> None:
    one = drawn([0.5], torch.ones(1, 3))
    numbers = summarise(one, one, ["a cat"], 2.0, EMBEDDED, METRICS)
    overall = numbers["overall"]
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert overall["kl"] == nothing | {"standard_error": None, "reweighted_prior": nothing}
    assert overall["strength"]["why"].startswith("one sample per prompt has nothing to be compared with")
    assert overall["reward"]["rise_in_prior_std"] is None
    assert overall["diversity"] is None
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    console = Console(width=100)
    with console.capture() as captured:
        show(numbers, METRICS, console)
    text = captured.get()
    assert "Achieved strength: unknown, as one sample per prompt" in text
    assert "Pays 0 nats where 0 would do." in text


def test_diversity_compares_equal_numbers_of_samples() -> None:
    # Six different prior pictures and two different posterior ones: over the first two of each both score 2.
    numbers = summarise(
        drawn([0.0] * 6, torch.eye(6)), drawn([0.0] * 2, torch.eye(6)[:2]), ["a cat"], 1.0, EMBEDDED, METRICS
    )
    found = numbers["overall"]["diversity"]
    assert found["prior"] == found["posterior"] == found["reweighted_prior"]
    assert found["samples"] == 2
    assert found["prior"]["vendi"] == pytest.approx(2.0)
    assert found["prior"]["pairwise_cosine_distance"] == pytest.approx(1.0)


def test_joined_batches_are_the_whole() -> None:
    a, b = drawn([0.0, 1.0], torch.eye(2)), drawn([2.0], torch.ones(1, 2))
    whole = Drawn.cat([a, b])
    assert whole.reward.tolist() == [0.0, 1.0, 2.0]
    assert whole.embedding is not None
    assert whole.embedding.shape == (3, 2)
    assert whole.log_q is not None
    assert Drawn.cat([drawn([0.0])]).embedding is None


def test_progress_is_told_of_every_sample() -> None:
    told: list[int] = []
    draw(Sampler(PixelPrior(), green, ["a", "b"], 3), EvalConfig(), 4, 0, posterior=False, advance=told.append)
    assert told == [3, 3, 2]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"embedder": green}, r"eval.embedder green has no method embed\(images\)"),
        ({"labeller": green}, r"eval.labeller function has no method classify\(images, classes\)"),
    ],
)
def test_tools_without_their_method_are_refused_before_sampling(tools: dict[str, Any], message: str) -> None:
    config = EvalConfig.model_validate({"labeller": {"component": "tests.oracles.pixel:Signs"}, "factors": [FACTOR]})
    with pytest.raises(ValueError, match=message):
        draw(Sampler(PixelPrior(), green, ["a"], 3), config, 2, 0, posterior=False, **({"labeller": Signs()} | tools))


def small_run(out: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "out": str(out),
            "prior": {"component": "tests.oracles.pixel:PixelPrior"},
            "reward": {"component": "tests.oracles.pixel:green"},
            "beta": 1.0,
            "prompts": {"list": ["a"]},
            "train": {
                "iterations": 1,
                "prompts_per_iteration": 1,
                "group": 4,
                "micro_batch": 4,
                "grid_every": 0,
            },
            "eval": {"samples": 1, "prior_samples": 3, "bootstrap": 5},
        }
    )


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    assemble(small_run(tmp_path)).fit()
    (weights,) = (tmp_path / "small" / "checkpoints").glob("*/posterior.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no complete checkpoint"):
        evaluate_run(tmp_path / "small")
    assert not (tmp_path / "small" / "eval").exists()


def test_the_written_numbers_are_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assemble(small_run(tmp_path)).fit()
    evaluate_run(tmp_path / "small")

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    written = (tmp_path / "small" / "eval" / "metrics.json").read_text()
    assert json.loads(written, parse_constant=refused)["samples"] == {"prior": 3, "posterior": 1}
    assert "Drawing 3 prior and 1 posterior samples" in capsys.readouterr().err.replace("\n", " ")
