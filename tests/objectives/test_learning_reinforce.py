"""The trainer and every policy gradient on a problem solved in closed form: who finds the posterior, and where the others go.

The pixel prior with a linear reward: posterior N(beta·v·c, v·I), the prior shifted, log Z = KL = beta²·v/2
(`tests/oracles/pixel.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import PixelPrior, end_variance, green

BETA = 1.6
STEPS = 3
V = end_variance(PixelPrior(STEPS))
LOG_Z = BETA**2 * V / 2

EXPLORE = [{"component": "on_policy", "exploration": 0.2, "until": 35}]
FROM_PRIOR = [{"component": "prior_buffer", "share": 0.5, "capacity": 128, "resample": False}]

FIND_IT: dict[str, dict[str, Any]] = {
    "reinforce_kl": {"objective": {"component": "reinforce_kl"}},
    "exact": {"objective": {"component": "reinforce_kl", "importance": "exact"}, "behaviours": EXPLORE},
    "self_normalised": {
        "objective": {"component": "reinforce_kl", "importance": "self_normalised"},
        "behaviours": FROM_PRIOR,
    },
    "tempered": {"objective": {"component": "reinforce_kl", "importance": "tempered"}, "behaviours": EXPLORE},
    "dpok": {"objective": {"component": "dpok"}},
    "dpok-gaussian": {"objective": {"component": "dpok", "kl": "gaussian"}},
    "grpo-k1": {
        "objective": {"component": "grpo", "kl": "k1_reward"},
        "train": {"updates_per_iteration": 2, "iterations": 30},
    },
    "grpo-gaussian": {"objective": {"component": "grpo", "kl": "gaussian", "normalise": "none"}},
}


def log_of_line(images: Tensor, prompts: list[str]) -> Tensor:
    """r = log(10 + c·x): exp(r), the reward that `reinforce_naive` sees, is linear; c·x is above -10 in 10 standard deviations."""
    return torch.log(10 + green(images, prompts))


def config(out: Path, recipe: dict[str, Any]) -> RunConfig:
    train = {"iterations": 45, "prompts_per_iteration": 1, "group": 128, "micro_batch": 128, "lr": 0.025}
    data = {
        "name": "pixel",
        "out": str(out),
        "prior": {"component": "tests.oracles.pixel:PixelPrior", "steps": STEPS},
        "reward": {"component": "tests.oracles.pixel:green"},
        "beta": BETA,
        "prompts": {"list": [""]},
        "train": train | {"lr_objective": 0.01, "lr_decay": "cosine", "checkpoint_every": 100, "grid_every": 0},
    }
    return RunConfig.model_validate(data | recipe | {"train": data["train"] | recipe.get("train", {})})


def trained(out: Path, recipe: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """After training: x_0 as one number per channel, reward and log_q - log_p of 1,024 samples."""
    trainer = assemble(config(out, recipe))
    trainer.fit()
    drawn = trainer.sampler.completed(trainer.sampler.draw([0] * 1024, [seed_of(9, k) for k in range(1024)]))
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    x_0 = drawn.trajectory.x_0.double().flatten(2).sum(2) / 4  # one standard normal number per channel
    return x_0, drawn.reward.double(), (drawn.log_q - drawn.log_p).sum(1)


@pytest.mark.parametrize("name", FIND_IT)
@pytest.mark.usefixtures("shapes_unchecked")
def test_the_known_posterior_is_found(name: str, tmp_path: Path) -> None:
    x_0, reward, log_ratio = trained(tmp_path, FIND_IT[name])
    torch.testing.assert_close(x_0.mean(0), torch.tensor([0.0, BETA * V, 0.0]).double(), rtol=0, atol=0.15)
    torch.testing.assert_close(x_0.std(0), torch.full((3,), V**0.5).double(), rtol=0, atol=0.08)
    assert float((BETA * reward - log_ratio).mean()) == pytest.approx(LOG_Z, abs=0.08)
    assert float(log_ratio.mean()) == pytest.approx(LOG_Z, abs=0.18)


@pytest.mark.usefixtures("shapes_unchecked")
def test_naive_reinforce_finds_its_own_target(tmp_path: Path) -> None:
    """R = 10 + c·x, so q ∝ p·exp(c·x / (2·kl_weight)): as if beta were 1.6. The posterior p·exp(r) = p·(10 + c·x) hardly moves."""
    recipe = {
        "objective": {"component": "reinforce_naive", "kl_weight": 1 / (2 * BETA)},
        "reward": {"component": "tests.objectives.test_learning_reinforce:log_of_line"},
        "beta": 1.0,
        "train": {"lr": 0.015},
    }
    x_0, _, log_ratio = trained(tmp_path, recipe)
    torch.testing.assert_close(x_0.mean(0), torch.tensor([0.0, BETA * V, 0.0]).double(), rtol=0, atol=0.15)
    assert float(log_ratio.mean()) == pytest.approx(LOG_Z, abs=0.18)
    posterior = V / 10  # E_p[c·x (10 + c·x)] / 10
    assert float(x_0.mean(0)[1]) > posterior + 0.5


@pytest.mark.usefixtures("shapes_unchecked")
def test_without_a_kl_the_reward_rises_past_the_posterior(tmp_path: Path) -> None:
    _, reward, log_ratio = trained(tmp_path, {"objective": {"component": "ddpo"}})
    assert float(reward.mean()) > BETA * V + 5
    assert float(log_ratio.mean()) > LOG_Z + 10
    assert float((BETA * reward - log_ratio).mean()) < LOG_Z - 10
