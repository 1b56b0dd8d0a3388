"""What a network that knows x_0 would answer, and what schedulers make of it, by closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffusion_rtb.chain.forward_process import denoised, knowing, network_predicts, signal_and_noise
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.chain.teacher_forcing import Visited
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from tests.oracles.behaving import run


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample", "velocity"])
@pytest.mark.parametrize(("a", "b"), [(0.9, 0.1), (0.3, 0.7), (1.0, 14.0)])
def test_who_knows_x_0_denoises_to_it(predicts: str, a: float, b: float) -> None:
    a = 1 - b if predicts == "velocity" else a
    x_0, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(denoised(predicts, x_t, knowing(predicts, x_0, x_t, a, b), a, b), x_0)


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0}), (DDIMScheduler, {"eta": 0.3})],
    ids=["ddpm", "ddim", "eta"],
)
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_its_step_is_the_forward_process_run_backwards(scheduler: Any, arguments: Any, predicts: str) -> None:
    """E[x_s | x_t, x_0] = a_s·x_0 + sqrt(b_s² - std²)·(x_t - a_t·x_0)/b_t: equation 7 of DDIM, at every step."""
    chain = scheduler(clip_sample=False, prediction_type=predicts)
    chain.set_timesteps(8)
    a, b = (level.tolist() for level in signal_and_noise(chain, chain.timesteps.float()))
    x_0, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    for i, t in enumerate(chain.timesteps[:-1]):
        call = StepCall(chain, chain.step, knowing(predicts, x_0, x_t, a[i], b[i]), t, x_t, **arguments)
        mean = previous_sample(call.mean())
        std = call.std(mean)
        expected = a[i + 1] * x_0 + math.sqrt(b[i + 1] ** 2 - std**2) * (x_t - a[i] * x_0) / b[i]
        torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0)


def test_a_wide_step_of_a_flow_has_a_mean_given_x_0_too() -> None:
    """x + [u + s²/(2t)·(x + (1 - t)·u)]·dt with u = (x_t - x_0)/t, where its noise is more than the state's."""
    flow = FlowMatchSDEScheduler(noise_level=0.7)
    flow.set_timesteps(4)
    assert network_predicts(flow) == "velocity"
    _, b = signal_and_noise(flow, flow.timesteps)
    x_0, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    wide = 0
    for i, timestep in enumerate(flow.timesteps[:-1]):
        t, s = float(b[i]), float(b[i + 1])
        u = (x_t - x_0) / t
        call = StepCall(flow, flow.step, knowing("velocity", x_0, x_t, 1 - t, t), timestep, x_t)
        mean = previous_sample(call.mean())
        std = call.std(mean)
        wide += std > s
        churn = (std / math.sqrt(t - s)) ** 2
        torch.testing.assert_close(mean, x_t + (u + churn / (2 * t) * (x_t + (1 - t) * u)) * (s - t), atol=1e-4, rtol=0)
        flow.step(u, timestep, x_t)
    assert wide > 0


def test_a_step_can_be_asked_about_another_answer(tmp_path: Any) -> None:
    """Within a replay, and without moving it: the mean of the answer itself is the mean, and means are linear in answers."""
    trainer = run(tmp_path)
    batch = trainer.sampler.draw([0] * 3, [1, 2, 3])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def ask(at: Visited) -> None:
        both = at.mean_of(at.output), at.mean_of(at.output + 1), at.mean_of(at.output + 3)
        torch.testing.assert_close(both[0], at.mean)
        torch.testing.assert_close(both[2] - both[0], 3 * (both[1] - both[0]), atol=1e-5, rtol=1e-4)
        seen.append(both)

    visit_states(trainer.prior, [""] * 3, batch.trajectory, [0, 2], ask)
    assert len(seen) == 2
