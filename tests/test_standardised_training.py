"""A reward with a memory in a run: what it learns is in the checkpoints, and a resumed run goes on with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.assemble import assemble
from diffusion_rtb.config import RunConfig
from diffusion_rtb.locate import build
from diffusion_rtb.reward_state import stateful_rewards
from diffusion_rtb.rewarding import RewardError
from diffusion_rtb.trained_run import open_trained_run
from tests.tiny import save_tiny


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


def test_a_resumed_run_has_the_statistics_and_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    whole = assemble(config(folder, tmp_path / "whole", 4))
    whole.fit()
    first = assemble(config(folder, tmp_path / "parts", 4))
    first.resume()
    with first.tracker:
        for iteration in range(2):
            first.tracker.log(iteration, first.step())
            first.iteration += 1
    first.save()
    second = assemble(config(folder, tmp_path / "parts", 4))
    second.fit()
    assert rows(tmp_path / "parts")[-2:] == rows(tmp_path / "whole")[-2:]
    (one,) = stateful_rewards(whole.actor.reward).values()
    (other,) = stateful_rewards(second.actor.reward).values()
    assert one.tensors()["moments"].tolist() == other.tensors()["moments"].tolist()
    assert float(one.tensors()["moments"][0]) == 16  # 4 iterations of 4 images


def test_the_evaluation_gets_the_statistics_of_the_run(tmp_path: Path) -> None:
    run = config(save_tiny(tmp_path / "tiny"), tmp_path, 1)
    trainer = assemble(run)
    trainer.fit()
    loaded = open_trained_run(tmp_path / "standardised").reward()
    assert loaded.statistics() == trainer.actor.reward.statistics()  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="has seen no values"):
        build(run.reward, "reward").statistics()
