"""V with the reward of the prior's estimate built in: the estimate in closed form, and what becomes of it at the ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.gradient import terms_of
from tests.oracles.behaving import differing, run, state

OBJECTIVE: dict[str, Any] = {"component": "trust_pcl", "length": 2, "boundary": True, "width": 8}


class Constant(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return torch.full((len(x_t),), -3.0)


@pytest.fixture
def trainer(tmp_path: Path, shapes_unchecked: None) -> Trainer:
    return run(tmp_path, objective=OBJECTIVE)


def test_the_estimate_is_the_reward_of_the_conditional_mean(trainer: Trainer) -> None:
    """E[data | x_t] = m + scale·a·S·(a²·S + b²)^-1·x_t of data N(m, scale²·S), the prior's also where q is another."""
    torch.manual_seed(0)
    for parameter in trainer.prior.parameters().values():
        parameter.data.normal_()
    parts = trainer.updates._scored(trainer.sources.draw(trainer.sampler, [0], 0, 1.3), 0)
    batch = parts["posterior"]
    terms = terms_of(trainer.sampler, batch)
    assert terms.signal is not None
    mean, covariance = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    scale = covariance.diagonal().mean().sqrt()
    S = covariance / scale**2
    assert batch.estimate is not None
    # At x_T a is 1e-4, which divides the rounding of float32.
    for column, (i, tolerance) in enumerate([(0, 5e-3), (2, 1e-5)]):
        alpha = trainer.prior.pipe.scheduler.alphas_cumprod[int(batch.trajectory.timesteps[i])]
        gain = alpha.sqrt() * S @ torch.linalg.inv(alpha * S + (1 - alpha) * torch.eye(2))
        data = mean + scale * batch.trajectory.x[:, i] @ gain.T
        expected = trainer.sampler.reward(data, [""] * 8)
        torch.testing.assert_close(batch.estimate[:, column], expected, atol=tolerance, rtol=tolerance)
        assert float(terms.signal[column]) == pytest.approx(float(alpha), rel=1e-4)


def test_v_goes_from_the_network_to_the_reward(trainer: Trainer) -> None:
    """s·r(x0_hat) + sqrt(1 - s)·F, and the reward at x_0."""
    parts = trainer.updates._scored(trainer.sources.draw(trainer.sampler, [0], 0, 1.3), 0)
    terms = terms_of(trainer.sampler, parts["posterior"])
    objective = TrustPCL(length=2, boundary=True)
    objective.value = Constant()
    values = objective.boundary_values(terms, 1.3)
    assert terms.signal is not None
    assert terms.estimate is not None
    s = terms.signal
    torch.testing.assert_close(values[:, :2], s * terms.estimate - 3 * (1 - s).sqrt(), check_dtype=False)
    torch.testing.assert_close(values[:, 2], terms.reward)
    assert float(s[0]) < 1e-6
    assert not objective.learns_value  # for steering: the network by itself is no V


def test_a_run_learns_and_goes_on(trainer: Trainer, tmp_path: Path) -> None:
    trainer.fit()
    run(tmp_path / "part", objective=OBJECTIVE, train={"iterations": 2}).fit()
    again = run(tmp_path / "part", objective=OBJECTIVE)
    again.fit()
    assert differing(state(trainer), state(again)) == []
    assert trainer.prior.parameters()["offset"].abs().max() > 0


@pytest.mark.parametrize("arguments", [{"length": None}, {"length": 1, "warm_up_updates": 5}])
def test_without_a_length_and_with_a_warm_up_it_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="boundary puts"):
        TrustPCL(boundary=True, **arguments)


def test_a_reward_that_moves_may_not_judge_estimates(tmp_path: Path) -> None:
    moving = {
        "component": "standardise",
        "samples": None,
        "reward": {"component": "density", "density": {"linear": [1.0, 0.5]}},
    }
    with pytest.raises(ValueError, match="objective TrustPCL with these settings lets it judge unfinished samples"):
        run(tmp_path, objective=OBJECTIVE, reward=moving)
