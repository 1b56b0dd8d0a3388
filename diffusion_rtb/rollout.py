"""Sample trajectories through a stock pipeline, and evaluate recorded ones again under the network as it is now.

*Rollout* runs the pipeline with a recorder around its scheduler. *Replay* is teacher forcing through the same pipeline call:
`step` returns the recorded x_s and scores it, so conditioning, guidance and added embeddings need no code here.

Backward inside the step: the gradient of every objective in this package is sum_t c_t · grad log_q(x_s | x_t) with numbers c_t
(the *cotangent*) that are known before any graph is built. `replay_backward` therefore calls backward inside each `step`,
whose graph is freed at once: the exact gradient of the whole trajectory in the activation memory of one network call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_rtb.interfaces import Prior
from diffusion_rtb.recorder import TrajectoryRecorder, with_previous_sample
from diffusion_rtb.seeds import generators, global_seed, seed_of
from diffusion_rtb.trajectory import Trajectory
from diffusion_rtb.transition import ConstantNoise, in_place_of, normal_log_prob, previous_sample, transition_mean

__all__ = ["replay", "replay_backward", "rollout", "score"]

LOG_DENSITY = torch.float64
"""Inside the trainer log_q - log_p is a difference of two sums near 1e4 nats (SD at 512 px): see `normal_log_prob`."""


def rollout(
    prior: Prior, prompts: Sequence[str], seeds: Sequence[int], *, noise_scale: Callable[[float], float] | None = None
) -> Trajectory:
    """Sample one trajectory per prompt from the network as it is now, each from its own seed; no gradients.

    Args:
        prior: Samples the posterior, or the prior inside `with prior.as_prior()`.
        prompts: One prompt per trajectory, (batch,).
        seeds: One seed per trajectory, (batch,).
        noise_scale: Exploration, see `TrajectoryRecorder`.

    Returns:
        The trajectories, with float64 log-densities in nats.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"rollout got {len(prompts)} prompts and {len(seeds)} seeds; it needs one seed per prompt.")
    pipe = prior.pipe
    call = prior.arguments(prompts) | _only_latents(pipe) | {"generator": generators(seeds)}
    recorder = TrajectoryRecorder(pipe.scheduler, noise_scale=noise_scale, dtype=LOG_DENSITY)
    with torch.no_grad(), global_seed(seed_of(0, *seeds)), recorder:
        pipe(**call)
    return recorder.trajectory


def score(prior: Prior, prompts: Sequence[str], trajectory: Trajectory) -> Float[Tensor, "batch steps"]:
    """Log-density of each transition under the network as it is now; no gradients, float64, nats."""
    return replay(prior.pipe, trajectory, dtype=LOG_DENSITY, **prior.arguments(prompts))


def replay(
    pipe: Any,
    trajectory: Trajectory,
    *,
    steps: Sequence[int] | None = None,
    grad: bool = False,
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> Float[Tensor, "batch steps"]:
    """Log-density of the recorded transitions under the network as it is now, summed over dims, in nats.

        log_prob = replay(pipe, trajectory, prompt="a cat emoji", num_inference_steps=20, eta=1.0)

    Args:
        pipe: The pipeline whose scheduler recorded the trajectory.
        trajectory: What was recorded.
        steps: Indices of the steps to evaluate; the others are skipped and stay 0. Default: all that have a density.
        grad: Keep the graph of all evaluated steps. Memory grows with their number; `replay_backward` needs that of one.
        dtype: Of the log-densities.
        **call: The arguments the pipeline was called with when it was recorded (prompt, steps, eta, guidance, …).

    Returns:
        (batch, steps); equal to `trajectory.log_prob` as long as the network is the recorded one.
    """
    rows: dict[int, Tensor] = {}
    with torch.set_grad_enabled(grad):
        _force(pipe, trajectory, _steps(trajectory, steps), dtype, rows.__setitem__, call)
    return _table(rows, trajectory, dtype)


def replay_backward(
    pipe: Any,
    trajectory: Trajectory,
    cotangent: Float[Tensor, "batch steps"],
    *,
    steps: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> Float[Tensor, "batch steps"]:
    """Accumulate the gradient of sum(cotangent · log_prob) into the network's parameters, one step's graph at a time.

    What the pipeline computes once for all steps (text embeddings) must not require gradients.

    Returns:
        The log-densities, (batch, steps), detached; nats.

    Raises:
        ValueError: the scheduler is multistep: its mean depends on earlier network outputs, whose graphs are gone.
    """
    if _keeps_history(pipe.scheduler):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} with solver_order={pipe.scheduler.config.solver_order} combines several network "
            "outputs in one step, so its gradient cannot be taken step by step. Set solver_order=1, or use DDIM with eta=1.0."
        )
    rows: dict[int, Tensor] = {}

    def backward(i: int, log_prob: Tensor) -> None:
        (cotangent[:, i].to(log_prob) * log_prob).sum().backward()  # type: ignore[no-untyped-call]
        rows[i] = log_prob.detach()

    with torch.enable_grad():
        _force(pipe, trajectory, _steps(trajectory, steps), dtype, backward, call)
    return _table(rows, trajectory, dtype)


def _steps(trajectory: Trajectory, steps: Sequence[int] | None) -> list[int]:
    dense = trajectory.stochastic.nonzero().flatten().tolist()
    if steps is None:
        return dense
    outside = sorted(set(steps) - set(dense))
    if outside:
        raise ValueError(f"Steps {outside} have no log-density; choose from {dense}.")
    return sorted(set(steps))


def _table(rows: dict[int, Tensor], trajectory: Trajectory, dtype: torch.dtype) -> Float[Tensor, "batch steps"]:
    zero = torch.zeros(trajectory.batch, dtype=dtype, device=trajectory.x.device)
    return torch.stack([rows.get(i, zero) for i in range(trajectory.steps)], dim=1)


def _keeps_history(scheduler: Any) -> bool:
    """Multistep solvers combine the network outputs of several steps."""
    return int(getattr(scheduler.config, "solver_order", 1)) > 1


def _only_latents(pipe: Any) -> dict[str, Any]:
    """Stop a pipeline before it decodes, where it can be asked to."""
    return {"output_type": "latent"} if "output_type" in inspect.signature(type(pipe).__call__).parameters else {}


def _force(
    pipe: Any,
    trajectory: Trajectory,
    steps: list[int],
    dtype: torch.dtype,
    visit: Callable[[int, Tensor], None],
    call: dict[str, Any],
) -> None:
    """Run the pipeline's own `__call__` along the recorded states; `visit(i, log_prob)` inside each evaluated step."""
    if not steps:
        return
    run = inspect.unwrap(type(pipe).__call__)  # sheds the pipeline's no_grad
    whole = _keeps_history(pipe.scheduler)
    forcing = _TeacherForcing(pipe.scheduler, trajectory, steps, dtype, visit, every_step=whole)
    with ExitStack() as stack:
        stack.enter_context(forcing.installed())
        x_T = trajectory.x[:, forcing.visited[0]]
        if "latents" in inspect.signature(run).parameters:
            # The pipeline multiplies by init_noise_sigma; `scale_model_input` hands it the exact state afterwards.
            call = call | {"latents": x_T / float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))}
        else:
            stack.enter_context(_InitialNoise(x_T))
            call = {"batch_size": trajectory.batch} | call
        run(pipe, **call | _only_latents(pipe))
    forcing.finished()


class _InitialNoise(TorchFunctionMode):
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


class _TeacherForcing:
    """Replaces `step`, `scale_model_input` and `set_timesteps` of one scheduler instance while a pipeline runs."""

    def __init__(
        self,
        scheduler: Any,
        trajectory: Trajectory,
        steps: list[int],
        dtype: torch.dtype,
        visit: Callable[[int, Tensor], None],
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
            raise RuntimeError(f"This {type(scheduler).__name__} is already being recorded or replayed: leave that first.")
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
            self.visit(i, normal_log_prob(x[:, i + 1], previous_sample(output), self.std[i], self.dtype))
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
