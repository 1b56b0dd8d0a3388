"""Guidance by a reward against the closed forms of a Normal prior: DPS where it is exact, LGD-MC where it becomes so."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusion_rtb.steering._reward_guidance import Guidance, guided

SPREAD, TILT, WANTED, PRECISION = 0.7, 1.3, 1.0, 1.0
KINDS = ("epsilon", "v_prediction", "sample")
TIMES = (999, 700, 400, 100, 0)


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=kind, clip_sample=False)


class Exact(nn.Module):
    """Denoiser of Normal(mean, SPREAD² I), by what it predicts."""

    def __init__(self, kind: str, mean: float = 0.0, answer: Callable[[Tensor], Any] = lambda x: (x,)) -> None:
        super().__init__()
        self.kind, self.mean, self.answer = kind, mean, answer
        self.alphas = scheduler(kind).alphas_cumprod.double()

    def forward(self, x: Tensor, t: Any) -> Any:
        a = self.alphas[int(t)]
        x_0 = self.mean + a.sqrt() * SPREAD**2 / (a * SPREAD**2 + 1 - a) * (x - a.sqrt() * self.mean)
        noise = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        output = {"epsilon": noise, "sample": x_0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_0}[self.kind]
        return self.answer(output)


def states() -> Tensor:
    return torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(x: Tensor) -> Tensor:
    """beta·r with the posterior Normal(SPREAD²·TILT, SPREAD² I)."""
    return TILT * x.flatten(1).sum(1)


def quadratic(x: Tensor) -> Tensor:
    return -0.5 * PRECISION * (x - WANTED).square().flatten(1).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_dps_is_the_exact_posterior_where_the_reward_is_linear(kind: str) -> None:
    prior, posterior = Exact(kind), Exact(kind, mean=SPREAD**2 * TILT)
    for t in TIMES:
        plain = prior(states(), t)[0]
        with guided(prior, scheduler(kind), Guidance(linear)), torch.no_grad():
            found = prior(states(), t)[0]
        torch.testing.assert_close(found, posterior(states(), t)[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(prior(states(), t)[0], plain)  # on leaving, the network is as it was


def test_the_stock_step_moves_by_beta_over_root_alpha() -> None:
    kind, t = "v_prediction", 300
    stock, prior = scheduler(kind), Exact("v_prediction")
    stock.set_timesteps(1000)
    a = float(stock.alphas_cumprod[t])
    gain = math.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a)  # of x0_hat in x_t
    before = stock.step(prior(states(), t)[0], t, states(), generator=seeded()).prev_sample
    with guided(prior, stock, Guidance(linear, scale=2.5)):
        output = prior(states(), t)[0]
    after = stock.step(output, t, states(), generator=seeded()).prev_sample
    expected = float(stock.betas[t] / stock.alphas[t].sqrt()) * 2.5 * gain * TILT
    torch.testing.assert_close(after - before, torch.full_like(before, expected), rtol=1e-4, atol=1e-6)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def shift(prior: Exact, guidance: Guidance, t: int) -> Tensor:
    """How far x0_hat moves."""
    with guided(prior, scheduler("sample"), guidance):
        moved = prior(states(), t)[0]
    return moved - prior(states(), t)[0]


@pytest.mark.parametrize("t", [800, 300])
def test_of_a_quadratic_reward_dps_forgets_the_variance_and_lgd_mc_finds_it(t: int) -> None:
    prior = Exact("sample")
    a = float(prior.alphas[t])
    gain, variance = math.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a), SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a)
    unit = (1 - a) / math.sqrt(a) * gain * (WANTED - prior(states(), t)[0])
    exact = unit / (1 / PRECISION + variance)
    torch.testing.assert_close(shift(prior, Guidance(quadratic), t), unit * PRECISION, rtol=1e-5, atol=1e-6)
    errors = []
    for samples in (10, 30_000):
        torch.manual_seed(0)
        found = shift(prior, Guidance(quadratic, samples=samples, spread=SPREAD), t)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 3


def test_it_answers_in_the_form_of_the_network() -> None:
    prior = Exact("sample", answer=lambda x: SimpleNamespace(sample=x))
    with guided(prior, scheduler("sample"), Guidance(linear)):
        assert prior(states(), 100).sample.shape == states().shape


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=0\.0 and spread=1\.0 must be positive"):
        Guidance(linear, scale=0.0)
    flow = FlowMatchEulerDiscreteScheduler()
    with (
        pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"),
        guided(Exact("sample"), flow, Guidance(linear)),
    ):
        pass
