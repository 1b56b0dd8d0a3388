"""Lead a pipeline along recorded states: its scheduler's `step` returns the recorded x_s and scores it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import Entry
from diffusion_rtb.chain.host_schedule import HostSchedule, place_in
from diffusion_rtb.chain.noise import ProbeNoise
from diffusion_rtb.chain.normal import normal_log_prob, precise
from diffusion_rtb.chain.recordable import check_recordable, own_setting, solver_order
from diffusion_rtb.chain.scheduler import StepCall, in_place_of, kept_state, previous_sample, with_previous_sample
from diffusion_rtb.chain.trajectory import Trajectory

__all__ = ["Mean", "TeacherForcing", "Visit", "Visited", "is_state"]


@dataclass(frozen=True, eq=False)
class Visited:
    """One step of a recorded chain under the network as it is now."""

    step: int
    """Its place in the recorded chain."""
    log_prob: Float[Tensor, " batch"]
    mean: Float[Tensor, "batch *dims"]
    """Of the transition."""
    output: Float[Tensor, "batch *dims"]
    """What the pipeline gave the scheduler: the network's answer, guided."""
    mean_of: Callable[[Tensor], Tensor]
    """The mean that another output, of the same shape, would have had in this step."""


Visit = Callable[[Visited], None]

Mean = Callable[[int, Tensor, Tensor], Tensor]
"""Of a step's transition, by its place in the chain, x_t and the network's answer there."""


SAME = "call the pipeline with the arguments it was recorded with"


class TeacherForcing:
    """Replaces `step`, `scale_model_input` and `set_timesteps` of one scheduler instance while a pipeline runs.

    A step is its place in the recorded chain, not its timestep: rounded schedules repeat timesteps.

    Args:
        scheduler: Of the pipeline that recorded the trajectory.
        trajectory: What was recorded.
        steps: Indices of the steps to evaluate.
        dtype: Of the log-densities.
        visit: Called inside each of them.
        stepwise: `visit` takes the gradient of each step alone.
        entry: "step": the pipeline evaluates its network once at a state of its own, and is answered with the first one.
        mean: Of transitions that are not the scheduler's own; None: the scheduler's.
    """

    def __init__(
        self,
        scheduler: Any,
        trajectory: Trajectory,
        steps: list[int],
        dtype: torch.dtype,
        visit: Visit,
        *,
        stepwise: bool,
        entry: Entry | None = None,
        mean: Mean | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.trajectory = trajectory
        self.evaluated = set(steps)
        self.mean = mean
        self.keeps_history = mean is None and solver_order(scheduler) > 1
        self.visited = list(range(trajectory.steps)) if self.keeps_history else steps
        self.dtype = dtype
        self.visit = visit
        self.stepwise = stepwise
        self.entering = entry == "step"
        self.std = trajectory.std.tolist()
        self.timesteps = trajectory.timesteps.tolist()
        self.position = 0
        self.x_t = trajectory.x[:, self.visited[0]].contiguous()
        self.handed = False
        self.host = HostSchedule(scheduler)
        self.schedule: Tensor | None = None
        self.first: int | None = None
        self.called: Callable[[], None] = lambda: None
        """Called whenever the pipeline calls its scheduler."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the instance; put everything back afterwards, also after an error."""
        scheduler = self.scheduler
        check_recordable(scheduler)
        if "step" in vars(scheduler):
            raise RuntimeError(
                f"This {type(scheduler).__name__} is already being recorded or replayed: leave that first."
            )
        before = dict(vars(scheduler))
        self.step = scheduler.step
        scheduler.step = in_place_of(scheduler.step, self._step)
        if hasattr(scheduler, "set_timesteps"):
            self.set_timesteps = scheduler.set_timesteps
            scheduler.set_timesteps = in_place_of(scheduler.set_timesteps, self._set_timesteps)
        if hasattr(scheduler, "scale_model_input"):
            self.scale = scheduler.scale_model_input
            scheduler.scale_model_input = in_place_of(scheduler.scale_model_input, self._scale_model_input)
        self._cut()  # for loops that set the timesteps elsewhere
        try:
            yield
        finally:
            vars(scheduler).clear()
            vars(scheduler).update(before)

    def finished(self) -> None:
        if self.position != len(self.visited):
            raise ValueError(
                f"The pipeline made {self.position} of the {len(self.visited)} steps to be replayed: {SAME}."
            )

    @property
    def current(self) -> int:
        return self.visited[min(self.position, len(self.visited) - 1)]

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.called()
        self.set_timesteps(*args, **kwargs)
        if not self._cut():
            raise ValueError(
                f"The recorded timesteps {self.timesteps} are no part of the pipeline's schedule "
                f"{self.scheduler.timesteps.tolist()}: {SAME}; a part of the steps can be replayed only on the whole schedule."
            )

    def _cut(self) -> bool:
        """Leave the steps that are not visited out of the schedule; False where the recorded chain is no part of it."""
        self.schedule, self.first = getattr(self.scheduler, "timesteps", None), None
        if len(self.visited) == self.trajectory.steps and not self.entering:
            return True
        start = self._place()
        if self.schedule is None or start is None:
            return False
        chosen = self.visited[:1] * self.entering + self.visited
        # Image-to-image pipelines leave out the start of the schedule themselves, others its end.
        end = range(start + self.trajectory.steps, len(self.schedule))
        kept = [*range(start), *(start + i for i in chosen), *end]
        self.scheduler.timesteps = self.host.part(self.schedule, kept)
        return True

    def _place(self) -> int | None:
        """Where the recorded chain begins in the scheduler's own schedule."""
        recorded = torch.tensor(self.timesteps, dtype=torch.float64)
        return None if self.schedule is None else place_in(self.host.copy(self.schedule), recorded)

    @contextmanager
    def _resumed(self) -> Iterator[None]:
        """The scheduler as it was at the current step of the recorded chain, with its whole schedule."""
        scheduler = self.scheduler
        with self.host.shown(self.schedule):
            if hasattr(scheduler, "_step_index"):
                self.first = self._first_index() if self.first is None else self.first
                scheduler._step_index = self.first + self.current
            yield

    def _first_index(self) -> int:
        """The scheduler's index of the chain's first step, found as it finds it itself."""
        scheduler = self.scheduler
        if getattr(scheduler, "_begin_index", None) is not None:
            return int(scheduler._begin_index)
        start = self._place()
        if self.schedule is None or start is None or not hasattr(scheduler, "index_for_timestep"):
            return start or 0
        return int(scheduler.index_for_timestep(scheduler.timesteps[start]))

    def _scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hand over the exact state: what the pipeline made of its `latents` may be rounded."""
        x_t = sample if self.entering else self.x_t
        copies = sample.shape[0] // x_t.shape[0]  # guidance runs the batch twice or three times
        exact = torch.cat([x_t] * copies) if copies > 1 else x_t
        self.handed = exact.shape == sample.shape
        with self._resumed():
            scaled: Tensor = self.scale(exact.to(sample.dtype) if self.handed else sample, *args, **kwargs)
        return scaled

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        self.called()
        call = StepCall(self.scheduler, self.step, *args, **kwargs)
        call.to_host(self.host.copy, passed=self.host.exact)
        with self._resumed():
            return self._enter(call) if self.entering else self._score(call)

    def _enter(self, call: StepCall) -> Any:
        """Answer the pipeline's own first state with the recorded one."""
        self.entering = self.handed = False
        with torch.no_grad():
            return with_previous_sample(call.noiseless(), self.x_t)

    def _score(self, call: StepCall) -> Any:
        i, x, x_t = self.current, self.trajectory.x, self.x_t
        self._check(call, i)
        exact = call.at(x_t)
        output = self._own(exact, i) if self.mean is None else self._answer(exact, i, self.mean)
        if self.keeps_history:
            with ProbeNoise(0.0):
                exact.made()  # the scheduler has to remember this network output
        self.position += 1
        self.handed = False
        following = self.visited[self.position] if self.position < len(self.visited) else i + 1
        # With the strides that the pipeline's own x_s would have: half precision rounds others differently.
        self.x_t = torch.empty_like(previous_sample(output), dtype=x.dtype, requires_grad=False).copy_(x[:, following])
        return with_previous_sample(output, self.x_t)

    def _own(self, exact: StepCall, i: int) -> Any:
        """The scheduler's transition, visited where it is evaluated."""
        self._check_history(exact)
        output = exact.mean()
        mean = previous_sample(output)
        if i in self.evaluated:
            self._check_std(exact.std(mean), i)
            given = Visited(
                i,
                self._log_prob(i, mean),
                mean,
                exact.model_output,
                lambda answer: previous_sample(exact.at(exact.sample, answer).mean()),
            )
            self.visit(given)
        return output

    def _answer(self, exact: StepCall, i: int, mean: Mean) -> Any:
        """The network's answer, visited; the scheduler is only asked for the form of what it returns."""
        x_t, answer = precise(exact.sample), exact.model_output
        zero = torch.zeros(len(x_t), dtype=self.dtype, device=x_t.device)
        self.visit(Visited(i, zero, mean(i, x_t, precise(answer)), answer, lambda other: mean(i, x_t, other)))
        with torch.no_grad():
            return exact.noiseless()

    def _log_prob(self, i: int, mean: Float[Tensor, "batch *dims"]) -> Float[Tensor, " batch"]:
        """Of the recorded transition; 0 where the step has no density."""
        if self.std[i] == 0:
            return torch.zeros(len(mean), dtype=self.dtype, device=mean.device)
        return normal_log_prob(self.trajectory.x[:, i + 1], mean, self.std[i], self.dtype)

    def _check_history(self, call: StepCall) -> None:
        """Find out at the first step what a scheduler of somebody's own carries from step to step."""
        if self.position > 0 or own_setting(self.scheduler, "solver_order") is not None:
            return
        kept = kept_state(call)
        self.keeps_history = bool(kept)
        if kept and (self.stepwise or self.visited != list(range(len(self.visited)))):
            raise ValueError(
                f"{call.name} keeps {', '.join(kept)} from step to step, so a step cannot be replayed apart from those before it: "
                "replay all steps at once, without replay_backward."
            )

    def _check(self, call: StepCall, i: int) -> None:
        """The pipeline has to be where the recording was: at its timestep, and at its state."""
        t, recorded, x_t = call.timestep, self.timesteps[i], call.sample
        if abs(t - recorded) > 1e-3 * max(1.0, abs(recorded)) or x_t.shape != self.x_t.shape:
            raise ValueError(
                f"Replay reached timestep {t:g} with states {tuple(x_t.shape)}, but step {i} was recorded at {recorded:g} with "
                f"{tuple(self.x_t.shape)}: {SAME}."
            )
        if not (self.handed or x_t is self.x_t or is_state(x_t, self.x_t)):
            raise ValueError(
                f"The pipeline evaluated its network at another state than the recorded one (step {i}, timestep {t:g}): it draws, "
                "noises or packs its first state in its own way. Give entry='step' to replay, which answers that state with the "
                "recorded one for one more network evaluation, or let the loop take `latents`."
            )

    def _check_std(self, std: float, i: int) -> None:
        if not math.isclose(std, self.std[i], rel_tol=1e-4):
            raise ValueError(
                f"Step {i} was recorded with standard deviation {self.std[i]:.6g}, and the scheduler steps with {std:.6g} now: "
                f"another eta, scheduler or scheduler setting. Use the recorded scheduler, and {SAME}."
            )


def is_state(x: Tensor, recorded: Tensor) -> bool:
    """Equal up to the rounding of a multiplication and its inverse in the coarser of both dtypes."""
    coarse = max(torch.finfo(x.dtype).eps, torch.finfo(recorded.dtype).eps)
    return torch.allclose(x.detach().to(recorded), recorded, rtol=4 * coarse, atol=4 * coarse)
