"""The flow sampler keeps the model's distribution and forgets x_T where it says so: exact recursions, and stock schedulers."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
    StableDiffusion3Pipeline,
)

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from tests.oracles.gaussian_flow import computed, marginal, posterior, sampled, schedule
from tests.oracles.loops import Loop, generators
from tests.oracles.tiny import tiny_stable_diffusion_3

KERNELS = {"marginal": marginal, "posterior": posterior}
M, V = 1.0, 0.25
LEVELS: list[tuple[str, float]] = [
    ("marginal", math.sqrt(2)),
    ("marginal", 1.0),
    ("marginal", 0.7),
    ("posterior", 1.0),
    ("posterior", 0.5),
]


def flow(steps: int = 0, **arguments: Any) -> FlowMatchSDEScheduler:
    scheduler = FlowMatchSDEScheduler(**arguments)
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize(("kernel", "level"), LEVELS)
def test_moments_of_its_own_steps_are_those_of_the_formulas(
    kernel: Any, level: float, steps: int, shift: float
) -> None:
    found = sampled(flow(steps, kernel=kernel, noise_level=level, shift=shift), M, V)
    expected = computed(KERNELS[kernel], level, schedule(steps, shift), M, V)
    for name, value in vars(expected).items():
        assert math.isclose(getattr(found, name), value, rel_tol=2e-5, abs_tol=2e-6), name


# Variance of x_0 over that of the data, and correlation with x_T, to three digits; the last step without noise.
TABLE: list[tuple[dict[str, Any], int, float, float]] = [
    ({}, 20, 1.005, 0.000),
    ({}, 50, 1.001, 0.000),
    ({"shift": 3.0}, 20, 0.963, 0.000),
    ({"shift": 3.0}, 50, 0.975, 0.000),
    ({"noise_level": 0.7}, 20, 0.966, 0.218),
    ({"noise_level": 0.7}, 50, 0.994, 0.188),
    ({"noise_level": 0.7, "shift": 3.0}, 50, 0.935, 0.142),
    ({"noise_level": 1.0}, 50, 0.997, 0.024),
    ({"kernel": "posterior"}, 20, 0.750, 0.000),
    ({"kernel": "posterior"}, 50, 0.881, 0.000),
    ({"kernel": "posterior", "shift": 3.0}, 20, 0.602, 0.000),
    ({"kernel": "posterior", "shift": 3.0}, 50, 0.782, 0.000),
]


@pytest.mark.parametrize(("arguments", "steps", "variance", "correlation"), TABLE)
def test_the_table(arguments: dict[str, Any], steps: int, variance: float, correlation: float) -> None:
    found = sampled(flow(steps, **arguments), M, V)
    assert (round(found.variance / V, 3), round(abs(found.correlation), 3)) == (variance, correlation)
    assert math.isclose(found.mean, M, abs_tol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_steps_have_the_variance_of_the_data(kernel: Any) -> None:
    error = [abs(sampled(flow(steps, kernel=kernel), M, V).variance / V - 1) for steps in (50, 200)]
    assert error[1] < min(0.04, error[0] / 3)


def test_the_last_step_leaves_no_grain() -> None:
    """Data of deviation 0.01: an Euler step of the SDE into 0 would leave 0.126."""
    assert math.sqrt(sampled(flow(20), M, 1e-4).variance) < 0.01


EVEN = np.linspace(1, 1 / 50, 50).tolist()
OTHERS: list[tuple[Any, list[float], float]] = [
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), EVEN, 0.460),
    (FlowMatchLCMScheduler(), EVEN, 0.460),
    (LTXEulerAncestralRFScheduler(), [*EVEN, 0.0], 0.882),
]


@pytest.mark.parametrize(("scheduler", "sigmas", "variance"), OTHERS, ids=lambda value: type(value).__name__)
def test_which_stochastic_schedulers_of_diffusers_halve_the_variance(
    scheduler: Any, sigmas: list[float], variance: float
) -> None:
    scheduler.set_timesteps(sigmas=sigmas)
    assert round(sampled(scheduler, M, V).variance / V, 3) == variance


def test_the_posterior_kernel_is_sde_dpm_solver_of_order_1_on_flow_sigmas() -> None:
    stock = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=3.0,
    )
    stock.set_timesteps(20)
    ours = FlowMatchSDEScheduler(kernel="posterior")
    ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
    x, u = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for t, t_stock in zip(ours.timesteps, stock.timesteps, strict=True):
        calls = [StepCall(ours, ours.step, u, t, x), StepCall(stock, stock.step, u, t_stock, x)]
        means = [previous_sample(call.mean()) for call in calls]
        torch.testing.assert_close(*means, rtol=1e-5, atol=1e-5)
        deviations = [call.std(mean) for call, mean in zip(calls, means, strict=True)]
        assert math.isclose(*deviations, rel_tol=1e-4, abs_tol=1e-6)
        for call in calls:
            call.made()


@pytest.mark.parametrize("kernel", KERNELS)
def test_level_0_is_the_stock_scheduler_bit_for_bit(kernel: Any) -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    ends = []
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), flow(shift=3.0, kernel=kernel, noise_level=0.0)):
        scheduler.set_timesteps(7)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step((0.3 * state).sin(), t, state, return_dict=False)[0]
        ends.append((state, scheduler.sigmas))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_sample_depends_on_its_batch(kernel: Any) -> None:
    """With a generator per row given to `step`, and with those of the recorder where the loop gives none."""
    scheduler = flow(kernel=kernel)
    whole, alone = Loop(scheduler)(5, generators(3)), Loop(scheduler)(5, generators(1, first=2))
    assert torch.equal(whole[2:], alone)
    x = torch.randn(3, 4, 16, 16)
    ends = []
    for rows in (slice(0, 3), slice(1, 2)):
        with TrajectoryRecorder(scheduler, generators=generators(3)[rows]):
            ends.append(Loop(scheduler)(5, latents=x[rows]))
    assert torch.equal(ends[0][1:2], ends[1])
    assert not torch.equal(ends[0][0], ends[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_recorded_as_drawn_and_replayed_to_the_bit(kernel: Any, dtype: torch.dtype) -> None:
    scheduler = flow(kernel=kernel)
    loop = Loop(scheduler, dtype)
    plain = loop(6, generators())
    with TrajectoryRecorder(scheduler) as recorder:
        assert torch.equal(loop(6, generators()), plain)
    trajectory = recorder.trajectory
    assert trajectory.stochastic.tolist() == [True] * 5 + [False]
    assert torch.equal(replay(loop, trajectory, num_inference_steps=6), trajectory.log_prob)


def test_its_schedule_ends_where_the_last_steps_still_have_noise() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(20)
    ours = flow(20, shift=3.0)
    expected = torch.tensor(schedule(20, 3.0))
    torch.testing.assert_close(ours.sigmas, expected, rtol=1e-6, atol=0)
    assert float(stock.sigmas[-2]) < 0.01
    assert float(ours.sigmas[-2]) > 0.13
    given = FlowMatchSDEScheduler(use_dynamic_shifting=True)
    given.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=1.15)  # as Flux does
    stated = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    stated.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=1.15)
    assert torch.equal(given.sigmas, stated.sigmas)
    given.set_timesteps(20, mu=1.15)  # as Stable Diffusion 3 does
    assert torch.equal(given.sigmas, stated.sigmas)


def test_no_sigmas_make_a_step_overshoot() -> None:
    """Beta sigmas crowd at 1, where the SDE's noise has no bound; also a schedule that begins a digit below 1."""
    crowded = flow(20, use_beta_sigmas=True)
    assert (
        max(std for _, _, std in map(crowded.transition, crowded.sigmas[:-2].tolist(), crowded.sigmas[1:-1].tolist()))
        < 1.5
    )
    kept, _, std = crowded.transition(1 - 6e-8, 0.95)
    assert (round(kept, 4), round(std, 4)) == (0.0, round(math.sqrt(2), 4))


STOCK = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "max_shift": 1.3,
    "shift_terminal": 0.1,
    "time_shift_type": "linear",
}


def test_a_stock_config_and_a_saved_one_keep_every_setting(tmp_path: Path) -> None:
    stock = FlowMatchEulerDiscreteScheduler(**STOCK)
    ours = FlowMatchSDEScheduler.from_config(stock.config, noise_level=1.0, window=[0, 4])
    for name, value in stock.config.items():
        assert name.startswith("_") or ours.config[name] == value, name
    ours.save_pretrained(tmp_path)
    again = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    assert (again.level, again.config.window, again.config.shift_terminal) == (1.0, [0, 4], 0.1)
    assert FlowMatchEulerDiscreteScheduler.from_config(again.config).config.max_shift == 1.3


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion_3()
    pipe.scheduler = FlowMatchSDEScheduler(shift=3.0, kernel="posterior")
    pipe.save_pretrained(tmp_path)
    without = {name: None for name, part in pipe.components.items() if part is None}
    scheduler = StableDiffusion3Pipeline.from_pretrained(tmp_path, **without).scheduler
    assert (type(scheduler), scheduler.config.shift, scheduler.config.kernel) == (
        FlowMatchSDEScheduler,
        3.0,
        "posterior",
    )


def test_it_has_every_argument_of_the_stock_scheduler() -> None:
    """One that a later diffusers adds would be lost by from_config."""
    stock, ours = (
        inspect.signature(c.__init__).parameters for c in (FlowMatchEulerDiscreteScheduler, FlowMatchSDEScheduler)
    )
    assert {name: stock[name].default for name in stock} == {name: ours[name].default for name in stock}
    for method in ("step", "set_timesteps"):
        old, new = (
            list(inspect.signature(getattr(c, method)).parameters)
            for c in (FlowMatchEulerDiscreteScheduler, FlowMatchSDEScheduler)
        )
        assert new[: len(old)] == old


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kernel": "cps"}, r"kernel='cps' must be one of 'marginal', 'posterior'"),
        ({"noise_level": 3.0}, r"noise_level=3.0 is outside \[0, 2\].*1.4142"),
        ({"noise_level": 1.2, "kernel": "posterior"}, r"outside \[0, 1\], the range of the posterior kernel"),
        ({"window": [4, 4]}, r"0 <= start < stop"),
        ({"window": [0.0, 4]}, r"\[start, stop\]"),
        ({"stochastic_sampling": True}, "another distribution"),
        ({"invert_sigmas": True}, "from data to noise"),
    ],
)
def test_what_is_no_sampler_is_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FlowMatchSDEScheduler(**arguments)


def test_an_index_for_a_timestep_and_timesteps_per_token_are_refused() -> None:
    scheduler = flow(4)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no index"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.zeros(1, 2))


def test_which_settings_are_without_memory() -> None:
    assert flow().memoryless
    assert flow(kernel="posterior").memoryless
    assert not flow(noise_level=1.0).memoryless
    assert not flow(kernel="posterior", noise_level=0.5).memoryless
    assert flow(window=[0, 4]).memoryless
    assert not flow(window=[1, 4]).memoryless
