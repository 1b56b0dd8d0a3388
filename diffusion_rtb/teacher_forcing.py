"""Lead a pipeline along recorded states: its scheduler's `step` returns the recorded x_s and scores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_rtb.recorder import with_previous_sample
from diffusion_rtb.trajectory import Trajectory
from diffusion_rtb.transition import ConstantNoise, in_place_of, normal_log_prob, previous_sample, transition_mean

__all__ = ["InitialNoise", "TeacherForcing", "Visit"]

Visit = Callable[[int, Tensor, Tensor], None]
"""`visit(i, log_prob, mean)`: log-density (batch,) and mean (batch, *dims) of step i under the network as it is now."""


class InitialNoise(TorchFunctionMode):
    """The first `torch.randn` of x_T's shape answers x_T, for pipelines that take no `latents`."""

    def __init__(self, x_T: Tensor) -> None:
        super().__init__()
        self.x_T: Tensor | None = x_T

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.randn and self.x_T is not None:
            size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if tuple(size) == tuple(self.x_T.shape):
                answer, self.x_T = self.x_T, None
                return answer
        return func(*args, **(kwargs or {}))


class TeacherForcing:
    """Replaces `step`, `scale_model_input` and `set_timesteps` of one scheduler instance while a pipeline runs."""

    def __init__(
        self,
        scheduler: Any,
        trajectory: Trajectory,
        steps: list[int],
        dtype: torch.dtype,
        visit: Visit,
        *,
        every_step: bool,
    ) -> None:
        self.scheduler = scheduler
        self.trajectory = trajectory
        self.evaluated = set(steps)
        self.visited = list(range(trajectory.steps)) if every_step else steps
        self.dtype = dtype
        self.visit = visit
        self.every_step = every_step
        self.std = trajectory.std.tolist()
        self.position = 0
        self.schedule: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the instance; put everything back afterwards, also after an error."""
        scheduler = self.scheduler
        if "step" in vars(scheduler):
            raise RuntimeError(
                f"This {type(scheduler).__name__} is already being recorded or replayed: leave that first."
            )
        before = dict(vars(scheduler))
        self.step = scheduler.step
        self.set_timesteps = scheduler.set_timesteps
        scheduler.step = in_place_of(scheduler.step, self._step)
        scheduler.set_timesteps = in_place_of(scheduler.set_timesteps, self._set_timesteps)
        if hasattr(scheduler, "scale_model_input"):
            self.scale = scheduler.scale_model_input
            scheduler.scale_model_input = in_place_of(scheduler.scale_model_input, self._scale_model_input)
        try:
            yield
        finally:
            vars(scheduler).clear()
            vars(scheduler).update(before)

    def finished(self) -> None:
        if self.position != len(self.visited):
            raise ValueError(
                f"The pipeline made {self.position} of the {len(self.visited)} steps to be replayed: call it with the arguments "
                "it was recorded with."
            )

    @property
    def current(self) -> int:
        return self.visited[min(self.position, len(self.visited) - 1)]

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Shorten the schedule to the steps to visit; `_resume` shows `step` the whole one."""
        self.set_timesteps(*args, **kwargs)
        self.schedule = self.scheduler.timesteps
        if len(self.visited) == self.trajectory.steps:
            return
        found, recorded = self.schedule.float().cpu(), self.trajectory.timesteps.float().cpu()
        if found.shape != recorded.shape or not torch.allclose(found, recorded):
            raise ValueError(
                f"The pipeline's schedule {found.tolist()} is not the recorded one {recorded.tolist()}: call it with the "
                "arguments it was recorded with; a part of the steps can be replayed only on the whole schedule."
            )
        self.scheduler.timesteps = self.schedule[self.visited]

    def _resume(self) -> None:
        """Put the scheduler where it was at the current step of the recorded chain."""
        if self.schedule is None:
            self.schedule = self.scheduler.timesteps
        self.scheduler.timesteps = self.schedule
        if hasattr(self.scheduler, "_step_index"):
            t = self.trajectory.timesteps[self.current].to(self.schedule.device)
            self.scheduler._step_index = int((self.schedule - t).abs().argmin())

    def _scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._resume()
        x_t = self.trajectory.x[:, self.current]
        copies = sample.shape[0] // x_t.shape[0]  # guidance runs the batch twice or three times
        exact = torch.cat([x_t] * copies) if copies > 1 else x_t
        scaled: Tensor = self.scale(exact.to(sample.dtype), *args, **kwargs)
        return scaled

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        i, x = self.current, self.trajectory.x
        self._check(timestep, sample, i)
        self._resume()
        call = (model_output, timestep, x[:, i], *args)
        output = transition_mean(self.scheduler, self.step, *call, **kwargs)
        if i in self.evaluated:
            mean = previous_sample(output)
            self.visit(i, normal_log_prob(x[:, i + 1], mean, self.std[i], self.dtype), mean)
        if self.every_step:
            with ConstantNoise(0.0):  # a multistep solver has to remember this network output
                self.step(*call, **kwargs)
        self.position += 1
        following = self.visited[self.position] if self.position < len(self.visited) else i + 1
        return with_previous_sample(output, x[:, following])

    def _check(self, timestep: Any, sample: Tensor, i: int) -> None:
        t, recorded = float(timestep), float(self.trajectory.timesteps[i])
        if abs(t - recorded) > 1e-3 * max(1.0, abs(recorded)) or sample.shape[0] != self.trajectory.batch:
            raise ValueError(
                f"Replay reached timestep {t:g} with a batch of {sample.shape[0]}, but step {i} was recorded at {recorded:g} with "
                f"{self.trajectory.batch}: call the pipeline with the arguments it was recorded with."
            )
