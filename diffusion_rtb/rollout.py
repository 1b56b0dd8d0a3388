"""Sample trajectories through a stock pipeline, and evaluate recorded ones again under the network as it is now.

*Rollout* runs the pipeline with a recorder around its scheduler. *Replay* is teacher forcing through the same pipeline call:
`step` returns the recorded x_s and scores it, so conditioning, guidance and added embeddings need no code here.

Backward inside the step: the gradient of every objective in this package is sum_t c_t · grad log_q(x_s | x_t) with numbers c_t
(the *cotangent*) that are known before any graph is built. `replay_backward` therefore calls backward inside each `step`,
whose graph is freed at once: the exact gradient of the whole trajectory in the activation memory of one network call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Prior
from diffusion_rtb.recorder import TrajectoryRecorder
from diffusion_rtb.seeds import generators, global_seed, seed_of
from diffusion_rtb.teacher_forcing import InitialNoise, TeacherForcing, Visit
from diffusion_rtb.trajectory import Trajectory
from diffusion_rtb.transition import gaussian_kl

__all__ = ["replay", "replay_backward", "rollout", "score", "score_with_means"]

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


def score_with_means(
    prior: Prior, prompts: Sequence[str], trajectory: Trajectory
) -> tuple[Float[Tensor, "batch steps"], Float[Tensor, "batch steps *dims"]]:
    """`score`, and the mean of each transition; 0 for a step without a density."""
    rows: dict[int, Tensor] = {}
    means = torch.zeros_like(trajectory.x[:, 1:])

    def keep(i: int, log_prob: Tensor, mean: Tensor) -> None:
        rows[i] = log_prob
        means[:, i] = mean

    with torch.no_grad():
        _force(prior.pipe, trajectory, _steps(trajectory, None), LOG_DENSITY, keep, prior.arguments(prompts))
    return _table(rows, trajectory, LOG_DENSITY), means


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
        _force(pipe, trajectory, _steps(trajectory, steps), dtype, lambda i, row, _: rows.__setitem__(i, row), call)
    return _table(rows, trajectory, dtype)


def replay_backward(
    pipe: Any,
    trajectory: Trajectory,
    cotangent: Float[Tensor, "batch steps"],
    *,
    steps: Sequence[int] | None = None,
    kl_cotangent: Float[Tensor, "batch steps"] | None = None,
    mean_p: Float[Tensor, "batch steps *dims"] | None = None,
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> Float[Tensor, "batch steps"]:
    """Accumulate the gradient of sum(cotangent · log_prob) into the network's parameters, one step's graph at a time.

    With a `kl_cotangent` the gradient of sum(kl_cotangent · KL(q || p)) is added, the KL of each transition in closed form
    from the prior's means `mean_p` (`score_with_means`).

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

    def backward(i: int, log_prob: Tensor, mean: Tensor) -> None:
        total = (cotangent[:, i].to(log_prob) * log_prob).sum()
        if kl_cotangent is not None and mean_p is not None:
            kl = gaussian_kl(mean, mean_p[:, i], float(trajectory.std[i]), dtype)
            total = total + (kl_cotangent[:, i].to(kl) * kl).sum()
        total.backward()
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
    visit: Visit,
    call: dict[str, Any],
) -> None:
    """Run the pipeline's own `__call__` along the recorded states; `visit` inside each evaluated step."""
    if not steps:
        return
    run = inspect.unwrap(type(pipe).__call__)  # sheds the pipeline's no_grad
    whole = _keeps_history(pipe.scheduler)
    forcing = TeacherForcing(pipe.scheduler, trajectory, steps, dtype, visit, every_step=whole)
    with ExitStack() as stack:
        stack.enter_context(forcing.installed())
        x_T = trajectory.x[:, forcing.visited[0]]
        if "latents" in inspect.signature(run).parameters:
            # The pipeline multiplies by init_noise_sigma; `scale_model_input` hands it the exact state afterwards.
            call = call | {"latents": x_T / float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))}
        else:
            stack.enter_context(InitialNoise(x_T))
            call = {"batch_size": trajectory.batch} | call
        run(pipe, **call | _only_latents(pipe))
    forcing.finished()
