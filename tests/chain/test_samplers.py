"""Every stochastic scheduler of diffusers in every dtype: samples untouched, the density that of what was drawn, replay exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward
from diffusion_rtb.chain.trajectory import Trajectory
from tests.oracles.loops import BATCH, DIMS, MULTISTEP, SAMPLERS, Loop, generators, sampler, squared_innovations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def recorded(loop: Loop, steps: int, seeded: bool = True, **options: Any) -> Trajectory:
    torch.manual_seed(3)
    with TrajectoryRecorder(loop.scheduler) as recorder:
        loop(steps, generators() if seeded else None, **options)
    return recorder.trajectory


def rounding(trajectory: Trajectory) -> Tensor:
    """What rounding to the dtype of the states adds to E[z²] of a step: (a few units in the last place / std)²."""
    dense = trajectory.stochastic
    scale = trajectory.x.double().abs().amax(dim=(0, *range(2, trajectory.x.ndim)))
    largest = torch.maximum(scale[:-1], scale[1:])[dense]
    unit = torch.finfo(trajectory.x.dtype).eps * largest
    return (unit / trajectory.std.double()[dense]) ** 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_recorded_is_what_was_drawn_and_replay_is_recorded(name: str, dtype: torch.dtype) -> None:
    steps = 6
    scheduler, options = sampler(name)
    loop = Loop(scheduler, dtype)
    for seeded in (True, False):
        torch.manual_seed(3)
        plain, after = loop(steps, generators() if seeded else None, **options), torch.rand(1)
        torch.manual_seed(3)
        with TrajectoryRecorder(scheduler) as recorder:
            seen, then = loop(steps, generators() if seeded else None, **options), torch.rand(1)
        assert torch.equal(plain, seen)
        assert torch.equal(after, then)
        trajectory = recorder.trajectory
        assert torch.equal(trajectory.x_0, seen)
        error = torch.tensor(squared_innovations(trajectory)).double() - 1
        noise = 5 * math.sqrt(2 / (BATCH * math.prod(DIMS)))
        assert (error.abs() <= noise + rounding(trajectory)).all(), (error, rounding(trajectory))
        again = replay(loop, trajectory, num_inference_steps=steps, **options)
        assert torch.equal(again, trajectory.log_prob)
    if name in MULTISTEP:
        return
    chosen = trajectory.stochastic.nonzero().flatten().tolist()[1::2]
    part = replay(loop, trajectory, steps=chosen, num_inference_steps=steps, **options)
    assert torch.equal(part[:, chosen], trajectory.log_prob[:, chosen])


SIGMAS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]


@pytest.mark.parametrize("steps", [20, 25, 30, 40, 50, 75, 100])
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_steps_at_repeated_timesteps_are_steps_of_their_own(sigmas: str, steps: int) -> None:
    """Rounded schedules have timesteps twice, with another sigma each time; sigmas are read as the oracle."""
    for begin in (None, 0):
        scheduler, _ = sampler("sde_dpm_1", **{sigmas: True})
        scheduler.set_timesteps(steps)
        if begin is None and scheduler.timesteps[0] == scheduler.timesteps[1]:
            continue  # diffusers itself begins at the second of them then, and runs out of sigmas at the end
        loop = Loop(scheduler)
        trajectory = recorded(loop, steps, begin=begin)
        sigma = scheduler.sigmas.double()
        alpha = 1 / (1 + sigma**2).sqrt()
        s, t = slice(1, None), slice(None, -1)
        std = (sigma * alpha)[s] * (1 - (sigma[s] / sigma[t]) ** 2).sqrt()
        torch.testing.assert_close(trajectory.std.double(), std, rtol=2e-4, atol=1e-7)
        error = torch.tensor(squared_innovations(trajectory)) - 1
        assert float(error.abs().max()) < 6 * math.sqrt(2 / (BATCH * math.prod(DIMS)))
        call = {"num_inference_steps": steps, "begin": begin}
        assert torch.equal(replay(loop, trajectory, call=call), trajectory.log_prob)
        chosen = trajectory.stochastic.nonzero().flatten().tolist()[::3][-8:]
        part = replay(loop, trajectory, steps=chosen, call=call)
        assert torch.equal(part[:, chosen], trajectory.log_prob[:, chosen])


def test_repeated_timesteps_are_there_to_be_tested() -> None:
    """Otherwise the test above could not fail."""
    repeated = 0
    for sigmas in SIGMAS:
        scheduler, _ = sampler("sde_dpm_1", **{sigmas: True})
        scheduler.set_timesteps(50)
        repeated += len(scheduler.timesteps) - len(scheduler.timesteps.unique())
    assert repeated >= 4


def test_the_gradient_of_a_part_is_that_of_its_steps_at_repeated_timesteps() -> None:
    scheduler, _ = sampler("sde_dpm_1", use_karras_sigmas=True)
    loop = Loop(scheduler, torch.float64)
    trajectory = recorded(loop, 50)
    chosen, weights = [3, 46, 47, 48], torch.randn(BATCH, 50, dtype=torch.float64)
    whole = replay(loop, trajectory, grad=True, dtype=torch.float64, num_inference_steps=50)
    (expected,) = torch.autograd.grad((weights * whole)[:, chosen].sum(), [loop.net.weight])
    replay_backward(loop, trajectory, weights, steps=chosen, dtype=torch.float64, num_inference_steps=50)
    assert loop.net.weight.grad is not None
    torch.testing.assert_close(loop.net.weight.grad, expected, rtol=1e-10, atol=0)
