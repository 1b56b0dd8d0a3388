"""Noise in a window of steps, the ODE elsewhere: what is recorded, and what that does to the posterior, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.continuation import continued
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward, rollout, score
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from tests.oracles.gaussian_flow import asked, moments, x_hat
from tests.oracles.loops import Loop, generators

STEPS, M, V, SLOPE = 20, 1.0, 0.25, 1.5
"""Steps; data N(M, V); beta·r(x) = SLOPE·x, whose posterior is N(M + SLOPE·V, V) for a chain that samples the data."""


class GaussianLoop:
    """A sampling loop around the exact velocity, which the posterior shifts by a number for each timestep."""

    def __init__(self, scheduler: Any, shifts: dict[float, float]) -> None:
        self.scheduler = scheduler
        self.shifts = shifts
        self.is_prior = False
        self.seen: list[bool] = []

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int, generator: Any = None, latents: Tensor | None = None, begin: int = 0
    ) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        self.scheduler.set_begin_index(begin)
        x = (
            torch.cat([torch.randn(1, 1, dtype=torch.float64, generator=g) for g in generator])
            if latents is None
            else latents
        )
        self.seen = []
        for timestep in self.scheduler.timesteps[begin:]:
            x = self.scheduler.step(self.velocity(x, float(timestep)), timestep, x, return_dict=False)[0]
        return x

    def velocity(self, x: Tensor, timestep: float) -> Tensor:
        self.seen.append(self.is_prior)
        t = timestep / 1000
        return (x - x_hat(x, t, M, V)) / t + (0.0 if self.is_prior else self.shifts.get(timestep, 0.0))


class GaussianFlow(Prior):
    """The members of `Prior` that sampling needs."""

    def __init__(self, scheduler: Any, shifts: dict[float, float], begin: int = 0) -> None:
        self.loop, self.begin = GaussianLoop(scheduler, shifts), begin

    @property
    def pipe(self) -> Any:
        return self.loop

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dims(self) -> tuple[int, ...]:
        return (1,)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"num_inference_steps": STEPS, "begin": self.begin}

    @contextmanager
    def as_prior(self) -> Iterator[None]:
        before, self.loop.is_prior = self.loop.is_prior, True
        try:
            yield
        finally:
            self.loop.is_prior = before


def flow(window: list[int]) -> Any:
    scheduler = FlowMatchSDEScheduler(kernel="posterior", window=window)
    scheduler.set_timesteps(STEPS)
    return scheduler


def solved(scheduler: Any, outside: float = 0.0) -> tuple[dict[float, float], float, float]:
    """What tilts the steps with noise by exp(SLOPE·x_0) if the ODE is the prior's; d V / d x_T; and V at x_T = 0, nats.

    E[exp(l·x_s) | x_t] = exp(l·(A·x_t + b) + l²·std²/2): the tilt of a step shifts its mean by l·std².

    Args:
        scheduler: With its timesteps set.
        outside: Shift of the velocity in the steps of the ODE, which no density sees.
    """
    tilt, value, shifts = SLOPE, 0.0, {}
    steps, sigmas = asked(scheduler, M, V), scheduler.sigmas.tolist()
    scheduler.set_timesteps(STEPS)
    for i in reversed(range(STEPS)):
        slope, shift, std = steps[i]
        value += tilt * shift + 0.5 * (tilt * std) ** 2
        per_unit = scheduler.transition(sigmas[i], sigmas[i + 1])[1] if std else 1.0
        shifts[float(scheduler.timesteps[i])] = tilt * std**2 / per_unit if std else outside
        tilt *= slope
    return shifts, tilt, value


def log_z(prior: Any, trajectory: Trajectory) -> Tensor:
    """beta·r - sum(log q - log p) of each trajectory."""
    prompts = [""] * trajectory.batch
    with prior.as_prior():
        log_p = score(prior, prompts, trajectory)
    log_q = score(prior, prompts, trajectory)
    return SLOPE * trajectory.x_0.flatten() - (log_q - log_p).sum(1)


@pytest.mark.parametrize("outside", [0.0, 0.3])
def test_a_window_from_the_start_is_exact_and_its_log_z_is_one_number(outside: float) -> None:
    """Whatever the adapters would do outside of it: there the network is the prior."""
    scheduler = flow([0, 10])
    shifts, slope, value = solved(scheduler, outside)
    prior = GaussianFlow(scheduler, shifts)  # type: ignore[abstract]
    found = log_z(prior, rollout(prior, [""] * 8, range(8)))
    assert abs(slope) < 1e-6
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=1e-4)
    scheduler.set_timesteps(STEPS)
    law = moments(asked(scheduler, M, V), scheduler.sigmas.tolist(), V)
    assert abs(value - (SLOPE * law.mean + 0.5 * SLOPE**2 * law.variance)) < 1e-5


def test_a_later_window_has_a_log_z_for_each_start() -> None:
    scheduler = flow([5, 10])
    shifts, slope, value = solved(scheduler)
    prior = GaussianFlow(scheduler, shifts)  # type: ignore[abstract]
    trajectory = rollout(prior, [""] * 8, range(8))
    assert slope > 0.2
    expected = value + slope * trajectory.x[:, 0].flatten()
    torch.testing.assert_close(log_z(prior, trajectory), expected, rtol=0, atol=1e-4)


def test_the_loss_cannot_see_adapters_that_move_the_ode() -> None:
    """Run with them after the window, RTB is at its optimum, log Z one number, and x_0 is off: why rollout runs the prior there."""
    scheduler = flow([0, 10])
    shifts, _, value = solved(scheduler, outside=0.3)
    prior = GaussianFlow(scheduler, shifts)  # type: ignore[abstract]
    tuned, own = TrajectoryRecorder(scheduler, dtype=torch.float64), rollout(prior, [""] * 8, range(8))
    with tuned:
        prior.loop(STEPS, generators(8))
    found = log_z(prior, tuned.trajectory)
    assert float(found.std()) < 1e-4
    assert abs(float(found.mean()) - value) > 0.1
    assert float((tuned.trajectory.x_0 - own.x_0).mean()) < -0.05


def test_the_network_is_the_prior_in_the_steps_of_the_ode_and_only_there() -> None:
    scheduler = flow([2, 17])
    prior = GaussianFlow(scheduler, {})  # type: ignore[abstract]
    trajectory = rollout(prior, ["", ""], [0, 1])
    inside = [2 <= i < 17 for i in range(STEPS)]
    assert prior.loop.seen == [not noisy for noisy in inside]
    assert trajectory.stochastic.tolist() == inside
    assert not prior.loop.is_prior
    assert torch.equal(score(prior, ["", ""], trajectory), trajectory.log_prob)
    assert len(prior.loop.seen) == 15  # the ODE costs nothing in scoring
    assert not trajectory.log_prob[:, [0, 1, 17, 18, 19]].any()
    with prior.as_prior():
        rollout(prior, ["", ""], [0, 1])
        assert prior.loop.is_prior


def test_the_network_is_put_back_after_an_error() -> None:
    prior = GaussianFlow(flow([2, 17]), {})  # type: ignore[abstract]
    seen: list[bool] = []

    def fail() -> None:
        with TrajectoryRecorder(prior.loop.scheduler, prior=prior.as_prior):
            seen.append(prior.loop.is_prior)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert not prior.loop.is_prior


def test_a_pipeline_that_begins_inside_the_schedule_is_refused_where_its_first_network_would_be_wrong() -> None:
    prior = GaussianFlow(flow([2, 17]), {}, begin=4)  # type: ignore[abstract]
    with pytest.raises(ValueError, match="begins inside its schedule"):
        rollout(prior, [""], [0])
    inside = GaussianFlow(flow([0, 17]), {}, begin=4)  # type: ignore[abstract]
    assert rollout(inside, [""], [0]).steps == STEPS - 4


def test_a_step_without_noise_is_an_error_unless_the_scheduler_means_it() -> None:
    class Silent(FlowMatchSDEScheduler):
        def ode_step(self, timestep: Any) -> bool:
            return False

        def step(self, *args: Any, **kwargs: Any) -> Any:
            silent = 2 <= self._coming(args[1]) < 4
            return super().step(*args, **kwargs | ({"variance_noise": torch.zeros_like(args[2])} if silent else {}))

    with (
        pytest.raises(ValueError, match="deterministic step"),
        TrajectoryRecorder(Silent()) as recorder,
    ):
        Loop(recorder.scheduler)(6)


def test_the_gradient_of_a_window_is_that_of_its_steps() -> None:
    loop = Loop(FlowMatchSDEScheduler(window=[1, 4]), torch.float64)
    with TrajectoryRecorder(loop.scheduler, dtype=torch.float64) as recorder:
        loop(6, generators())
    trajectory, weights = recorder.trajectory, torch.randn(3, 6, dtype=torch.float64)
    whole = replay(loop, trajectory, grad=True, dtype=torch.float64, num_inference_steps=6)
    (expected,) = torch.autograd.grad((weights * whole).sum(), [loop.net.weight])
    replay_backward(loop, trajectory, weights, dtype=torch.float64, num_inference_steps=6)
    torch.testing.assert_close(loop.net.weight.grad, expected, rtol=1e-10, atol=0)


def test_given_states_that_the_ode_would_have_had_to_make_are_refused() -> None:
    prior = GaussianFlow(flow([0, 10]), {})  # type: ignore[abstract]
    states = rollout(prior, [""], [0]).x
    again = continued(prior, [""], [3], states[:, :5])
    assert torch.equal(again.x[:, :5], states[:, :5])
    assert prior.loop.seen == [False] * 10 + [True] * 10
    with pytest.raises(ValueError, match="take back_and_forth out"):
        continued(prior, [""], [3], states[:, :15])
