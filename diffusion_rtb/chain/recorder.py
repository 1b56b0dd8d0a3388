"""Record every transition that a diffusers pipeline makes, by wrapping its scheduler's `step` inside a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.host_schedule import HostSchedule
from diffusion_rtb.chain.noise import RowNoise
from diffusion_rtb.chain.normal import normal_log_prob, output_norm
from diffusion_rtb.chain.recordable import STOCHASTIC, check_recordable, is_ode_step, refuse_deterministic
from diffusion_rtb.chain.scheduler import StepCall, in_place_of, previous_sample, with_previous_sample
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.versions import version

__all__ = ["Step", "TrajectoryRecorder"]


@dataclass(frozen=True, eq=False)
class Step:
    """One transition x_t -> x_s as it was made; which one it is, is its place among the steps, as timesteps may repeat."""

    timestep: float
    x_s: Float[Tensor, "batch *dims"]
    std: float
    log_prob: Float[Tensor, " batch"]
    output_norm: Float[Tensor, " batch"]
    log_behaviour: Float[Tensor, " batch"] | None
    left_to_ode: bool = False
    """Without noise on purpose."""


class TrajectoryRecorder:
    """Collect the transitions x_t -> x_s of one pipeline call and their log-densities.

        with TrajectoryRecorder(pipe.scheduler) as recorder:
            images = pipe("a cat emoji", num_inference_steps=20, eta=1.0).images
        trajectory = recorder.trajectory

    The samples are bit-identical to those of the unwrapped pipeline: the scheduler's own `step` draws them, and the
    recorder's questions (see `scheduler.py`) draw from no generator. Only the instance is wrapped, with the same signature,
    so that `isinstance`, the pipeline's look for `eta` and `save_pretrained` work; it is unwrapped on exit, also after an error.

    Args:
        scheduler: The pipeline's scheduler; any whose noise comes from `torch.randn`.
        noise_scale: Exploration. A step with standard deviation std draws its noise with `noise_scale(std)`·std, while
            `log_prob` stays the density of the unscaled chain; `log_behaviour` is that of the scaled one.
        dtype: Of the log-densities.
        generators: One per trajectory. Noise that `step` draws without a generator (pipelines of flow models pass none)
            comes from these, row by row, instead of the global one: then no sample depends on its batch. What a pipeline
            passes is left as it is.
        prior: Makes a block in which the network is the prior (`Prior.as_prior`): entered for the steps that the scheduler
            leaves to the ODE. Maps without a density are then the same for prior and posterior, whatever was learned.
        needs_noise: False for a chain of which x_0 is wanted and no density: then any step may be without noise.

    Raises:
        ValueError: see `recordable.py`; a step that is not the last has no noise, unless it needs none or the scheduler says that
            it is one of the ODE (`recordable.HasODESteps`); noise comes from elsewhere than `torch.randn`, the pipeline changes
            the latents between steps, or something is not finite; or, with `prior`, it begins inside a schedule whose first step is
            of the other kind.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        noise_scale: Callable[[float], float] | None = None,
        dtype: torch.dtype = torch.float32,
        generators: Sequence[torch.Generator] | None = None,
        prior: Callable[[], AbstractContextManager[None]] | None = None,
        needs_noise: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.needs_noise = needs_noise
        self._prior, self._as_prior = prior, ExitStack()
        self._is_prior = False
        self.noise_scale = noise_scale
        self.dtype = dtype
        self._rows = None if generators is None else RowNoise(generators)
        self.steps: list[Step] = []
        self._x_T: Tensor | None = None
        self._handed: tuple[Tensor, int | None] | None = None

    def __enter__(self) -> TrajectoryRecorder:
        check_recordable(self.scheduler)
        if "step" in vars(self.scheduler):
            raise RuntimeError(
                f"This {type(self.scheduler).__name__} is already being recorded or replayed: leave that block first."
            )
        self.steps, self._x_T, self._handed = [], None, None
        self._schedule = HostSchedule(self.scheduler)
        self._step = self.scheduler.step
        self.scheduler.step = in_place_of(self._step, self._on_host)
        self._prepare(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        vars(self.scheduler).pop("step", None)
        self._as_prior.close()

    def _prepare(self, timestep: Any) -> None:
        """Let the network be what the coming step wants."""
        before, self._is_prior = self._is_prior, self._wants_prior(timestep)
        if not self._is_prior:
            self._as_prior.close()
        elif not before and self._prior is not None:
            self._as_prior.enter_context(self._prior())

    def _wants_prior(self, timestep: Any) -> bool:
        return self._prior is not None and is_ode_step(self.scheduler, timestep)

    def _on_host(self, *args: Any, **kwargs: Any) -> Any:
        call, schedule = StepCall(self.scheduler, self._step, *args, **kwargs), self._schedule
        call.to_host(schedule.copy, passed=schedule.exact)
        with schedule.shown():
            return self._record(call)

    def _record(self, call: StepCall) -> Any:
        self._check_state(call)
        return self._transit(call)

    def _transit(self, call: StepCall) -> Any:
        """Make the step from where the call stands, and remember it."""
        mean, std = self._transition(call)
        noiseless = previous_sample(call.noiseless()) if std == 0 else None
        with self._row_by_row(call):
            output = call.made()
        x_s = previous_sample(output).detach()
        if noiseless is not None:
            self._check_deterministic(call, noiseless, x_s)
        if self.noise_scale is not None and std > 0:
            x_s = (mean + self.noise_scale(std) * (x_s - mean)).to(x_s.dtype)
            output = with_previous_sample(output, x_s)
        return self._append(call, output, mean, std)

    @torch.no_grad()
    def _transition(self, call: StepCall) -> tuple[Tensor, float]:
        mean = previous_sample(call.mean())
        return mean, call.std(mean)

    def _row_by_row(self, call: StepCall) -> AbstractContextManager[Any]:
        """Where the step draws without a generator; whether it does although it was given one, its first draw shows."""
        rows = self._rows
        needed = rows is not None and (not self.steps or rows.drew or call.get("generator") is None)
        return rows if rows is not None and needed else nullcontext()

    def _check_state(self, call: StepCall) -> None:
        """A step begins where the one before it ended, and only a last one is without noise, or one of the ODE."""
        if not self.steps or self._handed is None:
            self._x_T = call.sample.detach().clone()
            self._check_network(call)
            return
        before, x_t = self.steps[-1], call.sample
        if self.needs_noise and before.std == 0 and not before.left_to_ode:
            self._refuse(before.timestep, begun=True)
        handed, then = self._handed
        if x_t is handed and then is not None and version(x_t) == then:
            return  # no comparison on the device
        if not torch.equal(x_t.detach(), before.x_s):
            broken = "" if x_t.isfinite().all() else " They hold NaN or infinity now."
            raise ValueError(
                f"The latents were changed between steps (before timestep {call.timestep:g}): the recorded chain would not be "
                f"the one that was sampled. Remove the callback or use a pipeline that leaves the latents to its scheduler.{broken}"
            )

    def _check_network(self, call: StepCall) -> None:
        """The first step was made by the network that it wants, also where a pipeline begins inside its schedule."""
        if self._wants_prior(call.get(call.names[1])) != self._is_prior:
            raise ValueError(
                f"The pipeline begins inside its schedule, at timestep {call.timestep:g}, and its first step is not of the kind "
                f"that the first of {call.name} is. Let its window begin at 0 and reach over that step, or leave the window out."
            )

    def _check_deterministic(self, call: StepCall, noiseless: Tensor, x_s: Tensor) -> None:
        """A step that does not answer to `torch.randn` is without noise, bit for bit, and the first only if that is meant."""
        if not bool(((x_s - noiseless).abs() <= 16 * call.residue).all()):
            raise ValueError(
                f"{call.name} draws noise that does not come from torch.randn (timestep {call.timestep:g}), so its "
                f"density is unknown. Use {STOCHASTIC}."
            )
        if self.needs_noise and not self.steps and not call.left_to_ode:
            self._refuse(call.timestep, begun=False)

    def _refuse(self, timestep: float, *, begun: bool) -> None:
        """A step without noise where there has to be some."""
        refuse_deterministic(self.scheduler, timestep, begun=begun)

    def _append(self, call: StepCall, output: Any, mean: Tensor, std: float) -> Any:
        handed = previous_sample(output)
        x_s = handed.detach().clone()  # the pipeline may write over what it is handed
        zero = torch.zeros(x_s.shape[0], dtype=self.dtype, device=x_s.device)
        log_prob = zero if std == 0 else normal_log_prob(x_s, mean, std, self.dtype)
        norm = zero if std == 0 else output_norm(call.model_output, self.dtype)
        behaviour = None
        if self.noise_scale is not None:
            behaviour = zero if std == 0 else normal_log_prob(x_s, mean, self.noise_scale(std) * std, self.dtype)
        self.steps.append(Step(call.timestep, x_s, std, log_prob, norm, behaviour, call.left_to_ode))
        self._handed = (handed, version(handed))
        self._prepare(call.get(call.names[1]))
        return output

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded: x (batch, steps+1, *dims), timesteps and std (steps,), log_prob (batch, steps) in nats.

        Raises:
            RuntimeError: no step was recorded.
            NotFiniteError: a state is.
        """
        if self._x_T is None:
            raise RuntimeError("Nothing was recorded: call the pipeline whose scheduler this is inside the with block.")
        steps = self.steps
        x = torch.stack([self._x_T, *(step.x_s for step in steps)], dim=1)
        self._check_finite(x)
        explored = [step.log_behaviour for step in steps if step.log_behaviour is not None]
        return Trajectory(
            x=x,
            timesteps=_floats([step.timestep for step in steps], x),
            std=_floats([step.std for step in steps], x),
            log_prob=torch.stack([step.log_prob for step in steps], dim=1),
            log_behaviour=torch.stack(explored, dim=1) if explored else None,
            output_norm=torch.stack([step.output_norm for step in steps], dim=1),
        )

    def _check_finite(self, x: Float[Tensor, "batch steps_and_one *dims"]) -> None:
        """What the steps' own checks cannot see: a step that overflows in half precision only."""
        finite = x.isfinite().transpose(0, 1).flatten(1).all(1)
        if not finite.all():
            i = int((~finite).nonzero()[0]) - 1
            raise NotFiniteError(
                f"The state after step {i} (timestep {self.steps[i].timestep:g}) is NaN or infinity in {x.dtype}, from a finite "
                "network output: use float32."
            )


def _floats(values: list[float], like: Tensor) -> Float[Tensor, " steps"]:
    return torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
