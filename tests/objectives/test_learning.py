"""The trainer finds a posterior that is known in closed form, through a stock pipeline, with every objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import PixelPrior, end_variance

BETA = 1.6
V = end_variance(PixelPrior())
LOG_Z = BETA**2 * V / 2

RECIPES: dict[str, dict[str, Any]] = {
    "vargrad": {"objective": {"component": "rtb"}},
    "log_z": {"objective": {"component": "rtb", "log_z": "learned"}, "train": {"iterations": 80}},
    "sub_trajectories": {
        "objective": {"component": "trust_pcl", "length": 3},
        "train": {"lr_objective": 0.01, "iterations": 80},
    },
    "prior_share": {
        "behaviours": [
            {"component": "on_policy", "exploration": 0.3, "until": 40},
            {"component": "prior_buffer", "share": 0.5, "capacity": 256},
        ]
    },
    "some_steps": {"train": {"gradient_steps": 4, "iterations": 70}},
}


def config(out: Path, recipe: dict[str, Any]) -> RunConfig:
    train = {"iterations": 50, "prompts_per_iteration": 1, "group": 64, "micro_batch": 64, "lr": 0.015}
    data = {
        "name": "pixel",
        "out": str(out),
        "prior": {"component": "tests.oracles.pixel:PixelPrior"},
        "reward": {"component": "tests.oracles.pixel:green"},
        "beta": BETA,
        "prompts": {"list": [""]},
        "train": train | {"lr_objective": 0.1, "lr_decay": "cosine", "checkpoint_every": 80, "grid_every": 0},
    }
    return RunConfig.model_validate(data | recipe | {"train": data["train"] | recipe.get("train", {})})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("shapes_unchecked")
def test_the_known_posterior_is_found(name: str, tmp_path: Path) -> None:
    trainer = assemble(config(tmp_path, RECIPES[name]))
    trainer.fit()
    seeds = [seed_of(9, k) for k in range(1024)]
    drawn = trainer.sampler.completed(trainer.sampler.draw([0] * 1024, seeds[:1024]))
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    x_0 = drawn.trajectory.x_0.double().flatten(2).sum(2) / 4  # one standard normal number per channel
    log_ratio = (drawn.log_q - drawn.log_p).sum(1)
    # 1,024 samples: standard error of a mean 0.025, of a deviation 0.02; the rest is what 50 iterations leave.
    torch.testing.assert_close(x_0.mean(0), torch.tensor([0.0, BETA * V, 0.0]).double(), rtol=0, atol=0.12)
    torch.testing.assert_close(x_0.std(0), torch.full((3,), V**0.5).double(), rtol=0, atol=0.08)
    elbo = float((BETA * drawn.reward.double() - log_ratio).mean())
    assert elbo == pytest.approx(LOG_Z, abs=0.08)
    assert float(log_ratio.mean()) == pytest.approx(LOG_Z, abs=0.12)
    rows = [json.loads(line) for line in (tmp_path / "pixel" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["log_z"] == pytest.approx(LOG_Z, abs=0.12)
    assert rows[0]["elbo"] < 0.5 * LOG_Z < rows[-1]["elbo"]
