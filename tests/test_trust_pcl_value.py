"""Sub-trajectory Trust-PCL: the value network before training, and the weights of stretches."""

from __future__ import annotations

import pytest
import torch

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives.trust_pcl import TrustPCL

STEPS = 4


def noisy_rewards(n: int, slope: float, noise: float) -> Terms:
    """One state per trajectory, seen at every step, and r = slope·x[0] + noise·z."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 3, generator=generator).expand(n, STEPS + 1, 3)
    reward = slope * x[:, 0, 0] + noise * torch.randn(n, generator=generator)
    zero = torch.zeros(n, STEPS)
    return Terms(
        log_q=zero.clone().requires_grad_(),
        log_p=zero,
        reward=reward,
        prompt=torch.zeros(n, dtype=torch.long),
        x=x,
        timesteps=torch.tensor([900.0, 600.0, 300.0, 0.0]),
        features=torch.zeros(n, 1),
    )


def test_warm_up_finds_the_soft_value() -> None:
    """r given x is N(slope·x, noise²), so V = slope·x + beta·noise²/2: the mean reward plus what the soft maximum adds."""
    slope, noise, beta = 0.8, 0.7, 1.5
    objective = TrustPCL(length=1, warm_up_updates=600)
    torch.manual_seed(0)
    objective.prepare(1, (3,), 1)
    objective.warm_up(noisy_rewards(4000, slope, noise), beta)
    held_out = noisy_rewards(200, slope, noise)
    with torch.no_grad():
        value = objective.boundary_values(held_out, beta)[:, 1]
    expected = slope * held_out.x[:, 0, 0] + beta * noise**2 / 2
    inside = held_out.x[:, 0, 0].abs() < 1.5  # where there are samples to learn from
    assert float((value - expected)[inside].abs().mean()) < 0.12
    assert float((value - slope * held_out.x[:, 0, 0])[inside].mean()) == pytest.approx(beta * noise**2 / 2, abs=0.12)


def test_without_updates_warm_up_changes_nothing() -> None:
    objective = TrustPCL(length=1)
    objective.prepare(1, (3,), 1)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective.warm_up(noisy_rewards(10, 1.0, 0.0), 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())


def losses(weights: list[float] | None) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    objective = TrustPCL(length=2, weights=weights)
    objective.prepare(1, (3,), 1)
    terms = noisy_rewards(5, 1.0, 0.5)
    loss = objective(terms, 0.7).loss
    loss.backward()
    assert terms.log_q.grad is not None
    return float(loss.detach()), terms.log_q.grad


def test_weights_scale_the_gradient_of_their_stretch() -> None:
    plain, gradient = losses(None)
    equal, same = losses([1.0, 1.0])
    assert plain == equal
    assert torch.equal(gradient, same)
    _, weighted = losses([3.0, 0.5])
    torch.testing.assert_close(weighted[:, :2], 3.0 * gradient[:, :2])
    torch.testing.assert_close(weighted[:, 2:], 0.5 * gradient[:, 2:])


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        TrustPCL(length=2, weights=weights)


def test_weights_must_fit_the_stretches() -> None:
    objective = TrustPCL(length=2, weights=[1.0, 1.0, 1.0])
    objective.prepare(1, (3,), 1)
    with pytest.raises(ValueError, match="3 entries for 2 stretches"):
        objective(noisy_rewards(3, 1.0, 0.5), 1.0)


def test_what_needs_a_length_says_so() -> None:
    with pytest.raises(ValueError, match="length"):
        TrustPCL(weights=[1.0])
    with pytest.raises(ValueError, match="length"):
        TrustPCL(warm_up_updates=10)
