"""The forward process run backwards: DDIM's own step of eta 1, the weights of the bound, and levels beside the timesteps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusion_rtb.chain.forward_process import denoised, knowing, signal_and_noise
from diffusion_rtb.chain.reversal import Reversal
from diffusion_rtb.chain.scheduler import StepCall, previous_sample

STEPS = 6


def reversal(scheduler: Any) -> Reversal:
    scheduler.set_timesteps(STEPS)
    return Reversal.of(scheduler, scheduler.timesteps.float())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_it_is_ddim_of_eta_1(predicts: str) -> None:
    """Mean and deviation by diffusers' own step, at each step but the one to x_0."""
    chain = DDIMScheduler(clip_sample=False, prediction_type=predicts)
    found = reversal(chain)
    generator = torch.Generator().manual_seed(0)
    x_t, output = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    for i, t in enumerate(chain.timesteps[:-1]):
        call = StepCall(chain, chain.step, output, t, x_t, eta=1.0)
        mean = previous_sample(call.mean())
        torch.testing.assert_close(found.mean(i, x_t, output), mean, atol=1e-6, rtol=1e-5)
        assert float(found.std[i]) == pytest.approx(call.std(mean), rel=1e-5)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_errors_have_the_weights_of_the_bound(scheduler: Any) -> None:
    """(a_s²/b_s² - a_t²/b_t²)·|x0_hat - x_0|² / 2; the last step is one to x_0 + b_t/2·noise."""
    found = reversal(scheduler)
    a, b = signal_and_noise(scheduler, scheduler.timesteps.float())
    snr = [*(a / b).square().tolist(), 4 / float(b[-1]) ** 2]
    generator = torch.Generator().manual_seed(0)
    x_0, noise, end = torch.randn(3, 4, 3, dtype=torch.float64, generator=generator)
    for i in range(STEPS):
        x_t = a[i] * x_0 + b[i] * noise
        means = [
            found.mean(i, x_t, knowing(found.forward.predicts, known, x_t, float(a[i]), float(b[i])))
            for known in (end, x_0)
        ]
        error = (means[0] - means[1]).square().sum(1) / (2 * float(found.std[i]) ** 2)
        expected = 0.5 * (snr[i + 1] - snr[i]) * (end - x_0).square().sum(1)
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)


def test_a_solver_that_looks_twice_learns_from_one_of_two_equal_levels() -> None:
    found = reversal(HeunDiscreteScheduler())
    steps = len(found.std)
    assert steps == 2 * STEPS - 1
    assert [i for i in range(steps) if found.std[i] == 0] == list(range(1, steps, 2))


@pytest.mark.parametrize(
    "kind",
    [
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        DEISMultistepScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_a_network_that_knows_x_0_leads_towards_it(kind: Any) -> None:
    """x_t of every solver is at the level that its timestep has, so that x0_hat of the true answer is x_0."""
    Reversal.check(kind())
    chain = kind()
    found = reversal(chain)
    x_0, noise = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for a, b in found.forward.levels:
        answer = knowing(found.forward.predicts, x_0, a * x_0 + b * noise, a, b)
        if a > 0:
            torch.testing.assert_close(denoised(found.forward.predicts, a * x_0 + b * noise, answer, a, b), x_0)
    if hasattr(chain, "alphas_cumprod"):  # what the network was trained on
        t = chain.timesteps.double()
        trained = 0.5 * torch.log((1 - chain.alphas_cumprod.double()) / chain.alphas_cumprod)
        low = t.long()
        expected = trained[low].lerp(trained[(low + 1).clamp(max=len(trained) - 1)], t - low)
        ratio = torch.tensor([b / a for a, b in found.forward.levels], dtype=torch.float64).log()
        torch.testing.assert_close(ratio, expected, atol=0.01, rtol=0)


def test_levels_beside_the_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"KDPM2DiscreteScheduler takes steps between.*take HeunDiscreteScheduler"):
        Reversal.check(KDPM2DiscreteScheduler())
