"""Record every transition that a diffusers pipeline makes, by wrapping its scheduler's `step` inside a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.trajectory import Trajectory
from diffusion_rtb.transition import (
    in_place_of,
    normal_log_prob,
    previous_sample,
    refuse_deterministic,
    transition_mean,
    transition_std,
)

__all__ = ["TrajectoryRecorder"]

DEVIATIONS: WeakKeyDictionary[Any, dict[Hashable, dict[float, float]]] = WeakKeyDictionary()


class TrajectoryRecorder:
    """Collect the transitions x_t -> x_s of one pipeline call and their log-densities.

        with TrajectoryRecorder(pipe.scheduler) as recorder:
            images = pipe("a cat emoji", num_inference_steps=20, eta=1.0).images
        trajectory = recorder.trajectory

    The samples are bit-identical to those of the unwrapped pipeline: the scheduler's own `step` draws them, and the
    recorder's questions (see `transition.py`) draw from no generator. Only the instance is wrapped, with the same signature,
    so that `isinstance`, the pipeline's look for `eta` and `save_pretrained` work; it is unwrapped on exit, also after an error.

    Args:
        scheduler: The pipeline's scheduler; any whose noise comes from `torch.randn`.
        noise_scale: Exploration. A step with standard deviation std draws its noise with `noise_scale(std)`·std, while
            `log_prob` stays the density of the unscaled chain; `log_behaviour` is that of the scaled one.
        dtype: Of the log-densities.
    """

    def __init__(
        self, scheduler: Any, *, noise_scale: Callable[[float], float] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.scheduler = scheduler
        self.noise_scale = noise_scale
        self.dtype = dtype
        self._x: list[Tensor] = []
        self._timesteps: list[float] = []
        self._std: list[float] = []
        self._log_prob: list[Tensor] = []
        self._log_behaviour: list[Tensor] = []

    def __enter__(self) -> TrajectoryRecorder:
        if "step" in vars(self.scheduler):
            raise RuntimeError(
                f"This {type(self.scheduler).__name__} is already being recorded or replayed: leave that block first."
            )
        for part in (self._x, self._timesteps, self._std, self._log_prob, self._log_behaviour):
            part.clear()
        self._step = self.scheduler.step
        self.scheduler.step = in_place_of(self._step, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        vars(self.scheduler).pop("step", None)

    def _record(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = (model_output, timestep, sample, *args)
        with torch.no_grad():
            mean = previous_sample(transition_mean(self.scheduler, self._step, *call, **kwargs))
            std = self._deviation(call, kwargs)
        output = self._step(*call, **kwargs)
        x_s = previous_sample(output).detach()
        if std == 0:
            self._check_deterministic(timestep, mean, x_s)
        if self.noise_scale is not None and std > 0:
            x_s = (mean + self._scale(std) * (x_s - mean)).to(x_s.dtype)
            output = with_previous_sample(output, x_s)
        self._append(float(timestep), sample.detach(), x_s, mean, std)
        return output

    def _deviation(self, call: tuple[Any, ...], options: dict[str, Any]) -> float:
        """The step's standard deviation, asked for once per scheduler, schedule and timestep."""
        if not self._std:
            scheduler = self.scheduler
            schedule = (repr(scheduler.config), tuple(scheduler.timesteps.tolist()), options.get("eta"), call[2].dtype)
            self._known = DEVIATIONS.setdefault(scheduler, {}).setdefault(schedule, {})
        t = float(call[1])
        if t not in self._known:
            self._known[t] = transition_std(self.scheduler, self._step, *call, **options)
        return self._known[t]

    def _scale(self, std: float) -> float:
        return 1.0 if self.noise_scale is None else self.noise_scale(std)

    def _check_deterministic(self, timestep: Any, mean: Tensor, x_s: Tensor) -> None:
        """A step without noise is allowed at the end of the schedule, and only if it really is without noise."""
        last = float(timestep) == float(self.scheduler.timesteps[-1]) and len(self._std) > 0
        if not torch.allclose(mean.to(x_s.dtype), x_s, rtol=1e-2, atol=1e-4):
            raise ValueError(
                f"{type(self.scheduler).__name__} draws noise that does not come from torch.randn (timestep "
                f"{float(timestep):g}), so its density is unknown. Use DDPMScheduler, DDIMScheduler with eta=1.0, "
                f"EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'."
            )
        if not last:
            refuse_deterministic(self.scheduler, timestep)

    def _append(self, timestep: float, x_t: Tensor, x_s: Tensor, mean: Tensor, std: float) -> None:
        if not self._x:
            self._x.append(x_t)
        elif not (x_t is self._x[-1] or torch.equal(x_t, self._x[-1])):
            raise ValueError(
                f"The latents were changed between steps (before timestep {timestep:g}): the recorded chain would not be the "
                "one that was sampled. Remove the callback or use a pipeline that leaves the latents to its scheduler."
            )
        zero = torch.zeros(x_s.shape[0], dtype=self.dtype, device=x_s.device)
        self._x.append(x_s)
        self._timesteps.append(timestep)
        self._std.append(std)
        self._log_prob.append(normal_log_prob(x_s, mean, std, self.dtype) if std > 0 else zero)
        if self.noise_scale is not None:
            self._log_behaviour.append(
                normal_log_prob(x_s, mean, self._scale(std) * std, self.dtype) if std > 0 else zero
            )

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded: x (batch, steps+1, *dims), timesteps and std (steps,), log_prob (batch, steps) in nats.

        Raises:
            RuntimeError: no step was recorded.
        """
        if not self._std:
            raise RuntimeError("Nothing was recorded: call the pipeline whose scheduler this is inside the with block.")
        return Trajectory(
            x=torch.stack(self._x, dim=1),
            timesteps=_floats(self._timesteps, self._x[0]),
            std=_floats(self._std, self._x[0]),
            log_prob=torch.stack(self._log_prob, dim=1),
            log_behaviour=torch.stack(self._log_behaviour, dim=1) if self._log_behaviour else None,
        )


def _floats(values: list[float], like: Tensor) -> Float[Tensor, " steps"]:
    return torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def with_previous_sample(output: Any, x_s: Tensor) -> Any:
    """A scheduler output, tuple or object, with its previous sample replaced."""
    if isinstance(output, tuple):
        return (x_s, *output[1:])
    output.prev_sample = x_s
    return output
