"""A reward with a memory in a run: what it learns is in the checkpoints, and a resumed run goes on with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.scoring.call import RewardError
from diffusion_rtb.scoring.memory import stateful_rewards
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import run as known_run
from tests.oracles.tiny import save_tiny


@pytest.fixture(autouse=True)
def few_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.standardise.FIRST_SAMPLES", 8)


def config(folder: Path, out: Path, iterations: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "standardised",
            "out": str(out),
            "prior": {"component": "stable_diffusion", "path": str(folder), "steps": 2, "device": "cpu"},
            "posterior": {"rank": 2, "alpha": 2.0, "target_modules": ["to_v"]},
            "reward": {"component": "standardise", "reward": {"component": "jpeg"}, "samples": None},
            "beta": 1.0,
            "prompts": {"list": ["a cat", "a dog"]},
            "train": {
                "iterations": iterations,
                "prompts_per_iteration": 2,
                "group": 2,
                "micro_batch": 4,
                "checkpoint_every": 1,
                "grid_every": 0,
            },
        }
    )


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "standardised" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_resumed_run_has_the_statistics_and_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    whole = assemble(config(folder, tmp_path / "whole", 4))
    whole.fit()
    assemble(config(folder, tmp_path / "parts", 2)).fit()
    second = assemble(config(folder, tmp_path / "parts", 4))
    second.fit()
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    (one,) = stateful_rewards(whole.sampler.reward).values()
    (other,) = stateful_rewards(second.sampler.reward).values()
    assert one.tensors()["moments"].tolist() == other.tensors()["moments"].tolist()
    assert float(one.tensors()["moments"][0]) == 8 + 16  # of the prior, then 4 iterations of 4 images


def samples_of_the_prior(trainer: Trainer, count: int) -> np.ndarray[Any, Any]:
    """The vectors that rewards are shown before training."""
    seeds = [seed_of(trainer.config.seed, "statistics", n) for n in range(count)]
    x_0 = [trainer.sampler.samples_of_prior([0] * 4, seeds[i : i + 4]) for i in range(0, count, 4)]
    return torch.cat([trainer.prior.decode(x) for x in x_0]).double().numpy()


def test_statistics_are_the_priors_and_stay(tmp_path: Path) -> None:
    a = {"linear": [1.0, 0.5]}
    reward = {"component": "standardise", "reward": {"component": "density", "density": a}, "samples": 60}
    learner = {"component": "trust_pcl", "length": 2, "width": 4, "warm_up_updates": 2}
    kept = [{"component": "prior_buffer", "share": 0.25, "capacity": 8}, {"component": "replay", "share": 0.25}]
    trainer = known_run(tmp_path, reward=reward, objective=learner, behaviours=kept)
    trainer.fit()
    expected = samples_of_the_prior(trainer, 60) @ a["linear"]
    mean, std = trainer.sampler.reward.statistics()  # type: ignore[attr-defined]
    assert mean == pytest.approx(expected.mean(), abs=1e-6)
    assert std == pytest.approx(expected.std(), rel=1e-6)
    # What is stored has the reward that it would be given today.
    for name in ("prior", "replay"):
        held = trainer.sources[name][0].memory[0]  # type: ignore[attr-defined]
        today = trainer.sampler.rewards(held.trajectory.x_0, [0] * len(held))
        torch.testing.assert_close(today, held.reward, rtol=0, atol=1e-5)


def test_what_is_inside_learns_first(tmp_path: Path) -> None:
    """A sum of two parts in units of their spreads, in units of its own: the outer statistics are those of settled parts."""
    parts = [
        {
            "component": "standardise",
            "reward": {"component": "density", "density": {"linear": direction}},
            "samples": samples,
            "name": name,
        }
        for name, direction, samples in (("a", [1.0, 0.0], 40), ("b", [0.0, 5.0], 60))
    ]
    both = {"component": "weighted_sum", "rewards": parts}
    trainer = known_run(tmp_path, reward={"component": "standardise", "reward": both, "samples": 50})
    trainer._begin()
    shown = samples_of_the_prior(trainer, 60)
    expected = np.sum([(v - v.mean()) / v.std() for v in (shown[:, 0], 5 * shown[:, 1])], axis=0)
    mean, std = trainer.sampler.reward.statistics()  # type: ignore[attr-defined]
    assert mean == pytest.approx(expected.mean(), abs=1e-5)
    assert std == pytest.approx(expected.std(), rel=1e-5)


def test_the_evaluation_gets_the_statistics_of_the_run(tmp_path: Path) -> None:
    run = config(save_tiny(tmp_path / "tiny"), tmp_path, 1)
    trainer = assemble(run)
    trainer.fit()
    loaded = open_trained_run(tmp_path / "standardised").reward()
    assert loaded.statistics() == trainer.sampler.reward.statistics()  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="has seen no values"):
        build(run.reward, "reward").statistics()
