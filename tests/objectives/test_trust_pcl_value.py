"""Sub-trajectory Trust-PCL: the value network before training."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal

from diffusion_rtb.chain.forward_process import noised
from diffusion_rtb.config.components import describe
from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives.trust_pcl import TrustPCL, returns_loss

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


def unused(x_0: Tensor, timesteps: Tensor, generator: torch.Generator) -> Tensor:
    raise AssertionError("recorded states are not noised")


def test_warm_up_finds_the_soft_value() -> None:
    """r given x is N(slope·x, noise²), so V = slope·x + beta·noise²/2: the mean reward plus what the soft maximum adds."""
    slope, noise, beta = 0.8, 0.7, 1.5
    objective = TrustPCL(length=1, warm_up_updates=600, warm_up_states="recorded")
    torch.manual_seed(0)
    objective.prepare(1, (3,), 1)
    objective.warm_up(noisy_rewards(4000, slope, noise), beta, unused)
    held_out = noisy_rewards(200, slope, noise)
    with torch.no_grad():
        value = objective.boundary_values(held_out, beta)[:, 1]
    expected = slope * held_out.x[:, 0, 0] + beta * noise**2 / 2
    inside = held_out.x[:, 0, 0].abs() < 1.5  # where there are samples to learn from
    assert float((value - expected)[inside].abs().mean()) < 0.12
    assert float((value - slope * held_out.x[:, 0, 0])[inside].mean()) == pytest.approx(beta * noise**2 / 2, abs=0.12)


@pytest.mark.parametrize(("unit", "nats"), [(1.0, 1.5), (0.03, 300.0), (1e6, 30.0)])
def test_warm_up_at_any_tilt_in_any_unit(unit: float, nats: float) -> None:
    """r = unit·x is known from x, so V = r however large beta·sd(r) = `nats` is; V starts at the best reward of 4,000."""
    terms = noisy_rewards(4000, 1.0, 0.0)
    objective = TrustPCL(length=1, warm_up_updates=600, warm_up_states="recorded")
    torch.manual_seed(0)
    objective.prepare(1, (3,), 1)
    objective.warm_up(replace(terms, reward=unit * terms.reward), nats / unit, unused)
    held_out = noisy_rewards(200, 1.0, 0.0)
    with torch.no_grad():
        value = objective.boundary_values(held_out, nats / unit)[:, 1] / unit
    assert float((value - held_out.reward).square().mean().sqrt()) < 0.1  # standard deviations of r


def test_warm_up_weighs_alike_in_every_unit() -> None:
    """A power of two rounds nothing: the soft value is the same to the last bit."""
    values = []
    for unit in (1.0, 2.0**-20, 2.0**20):
        terms = noisy_rewards(500, 0.8, 0.7)
        objective = TrustPCL(length=1, warm_up_updates=50, warm_up_states="recorded")
        torch.manual_seed(0)
        objective.prepare(1, (3,), 1)
        objective.warm_up(replace(terms, reward=unit * terms.reward), 1.5 / unit, unused)
        with torch.no_grad():
            values.append(objective.boundary_values(terms, 1.5 / unit)[:, 0] / unit)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize("nats", [3.0, 7.0, 100.0, 1e4])
def test_returns_far_above_v_are_finite(nats: float) -> None:
    """The gradient is that of exp(z) - z - 1 up to a factor that all of a batch share; up to 7 nats the factor is 1."""
    log_ratio = torch.zeros(3, 1, dtype=torch.float64)
    reward = torch.tensor([nats, nats - 1, 0.0], dtype=torch.float64)
    values = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    loss = returns_loss(values, reward, log_ratio, 1.0)
    loss.backward()
    shrunk = max(0.0, nats - 7)
    expected = [math.exp(-shrunk) * (1 + float(r)) - math.exp(float(r) - shrunk) for r in reward]
    assert float(loss.detach()) == pytest.approx(-sum(expected) / 3, rel=1e-12)
    slopes = [math.exp(-shrunk) - math.exp(float(r) - shrunk) for r in reward]
    assert values.grad is not None
    assert values.grad.flatten().tolist() == pytest.approx([slope / 3 for slope in slopes], rel=1e-12)


def test_warm_up_on_noised_states_finds_the_soft_value() -> None:
    """x_0 is N(0, I), so x_0 given x_t is N(sqrt(a)·x_t, (1 - a)·I), and with r = slope·x_0[0]
    V(x_t) = slope·sqrt(a)·x_t[0] + beta·slope²·(1 - a)/2."""
    slope, beta = 0.9, 1.3
    scheduler = DDPMScheduler()
    objective = TrustPCL(length=1, warm_up_updates=1500, value_loss="none")
    torch.manual_seed(0)
    objective.prepare(1, (3,), 1)
    terms = noisy_rewards(4000, slope, 0.0)
    objective.warm_up(terms, beta, partial(noised, scheduler))
    x_t = noisy_rewards(300, slope, 0.0).x[:, 0]
    inside = x_t[:, 0].abs() < 1.5
    assert objective.value is not None
    for t in (900.0, 600.0, 300.0):
        a = float(scheduler.alphas_cumprod[int(t)])
        with torch.no_grad():
            value = objective.value(x_t, torch.full((300,), t), torch.zeros(300, 1))
        expected = slope * a**0.5 * x_t[:, 0] + beta * slope**2 * (1 - a) / 2
        assert float((value - expected)[inside].abs().mean()) < 0.12
    assert not any(parameter.requires_grad for parameter in objective.parameters())


def test_returns_weigh_the_chain_that_drew_them() -> None:
    """One step from x_T = 0: b draws x_0 from N(m, 1), p is N(0, 1), r = x_0.

    So V(x_T) = 1/beta·log E_p[exp(beta·x_0)] = beta/2.
    """
    beta, m = 0.8, 0.5
    x_0 = m + torch.randn(400_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_ratio = (Normal(m, 1.0).log_prob(x_0) - Normal(0.0, 1.0).log_prob(x_0))[:, None]
    value = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([value], line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = returns_loss(value.expand(len(x_0), 1), x_0, log_ratio, beta)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    assert float(value.detach()) == pytest.approx(beta / 2, abs=0.005)  # standard error 0.001


def test_the_soft_value_of_the_prior_has_no_returns_gradient_on_average() -> None:
    """Two steps x_2 -> x_1 -> x_0 of unit variance, r = x_0: V(x_i) = x_i + beta·(steps left)/2, whatever chain draws."""
    beta, shift = 0.6, 0.7
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([torch.zeros(200_000, 1, dtype=torch.float64), (z + shift).cumsum(1)], 1)
    log_ratio = Normal(shift, 1.0).log_prob(z + shift) - Normal(0.0, 1.0).log_prob(z + shift)
    values = (x[:, :2] + beta * torch.tensor([2.0, 1.0]) / 2).requires_grad_()
    returns_loss(values, x[:, 2], log_ratio, beta).backward()
    assert values.grad is not None
    total = values.grad * values.numel()
    error = total.std(0) / len(total) ** 0.5
    assert (total.mean(0).abs() < 4 * error).all()


@pytest.mark.parametrize("t", [980, 500, 3])
def test_noising_has_the_moments_of_the_forward_process(t: int) -> None:
    scheduler = DDPMScheduler()
    x_0 = torch.full((20_000, 2), 3.0)
    x_t = noised(scheduler, x_0, torch.full((20_000,), float(t)), torch.Generator().manual_seed(0))
    a = float(scheduler.alphas_cumprod[t])
    error = ((1 - a) / 20_000) ** 0.5
    torch.testing.assert_close(x_t.mean(0), torch.full((2,), 3 * a**0.5), rtol=0, atol=5 * error)
    torch.testing.assert_close(x_t.std(0), torch.full((2,), (1 - a) ** 0.5), rtol=0.03, atol=0)


def test_a_scheduler_without_a_forward_process_is_refused() -> None:
    with pytest.raises(ValueError, match="object has neither add_noise nor scale_noise"):
        noised(object(), torch.zeros(1, 2), torch.zeros(1))


def test_a_frozen_value_needs_a_warm_up() -> None:
    with pytest.raises(ValueError, match="warm_up_updates"):
        TrustPCL(length=1, value_loss="none")
    describe({"component": "trust_pcl", "length": 1, "warm_up_updates": 5, "warm_up_states": "noised"}, "objective")
    with pytest.raises(ValueError, match="warm_up_states"):
        describe({"component": "trust_pcl", "length": 1, "warm_up_updates": 5, "warm_up_states": "x"}, "objective")


def test_without_updates_warm_up_changes_nothing() -> None:
    objective = TrustPCL(length=1)
    objective.prepare(1, (3,), 1)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective.warm_up(noisy_rewards(10, 1.0, 0.0), 1.0, unused)
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())


def test_what_needs_a_length_says_so() -> None:
    with pytest.raises(ValueError, match="length"):
        TrustPCL(warm_up_updates=10)
