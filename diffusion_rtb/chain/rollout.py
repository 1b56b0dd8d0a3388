"""Sample trajectories through a stock pipeline, and evaluate recorded ones again under the network as it is now.

*Rollout* runs the pipeline with a recorder around its scheduler. *Replay* is teacher forcing through the same pipeline call:
`step` returns the recorded x_s and scores it, so conditioning, guidance and added embeddings need no code here.

Backward inside the step: the gradient of every objective in this package is sum_t c_t · grad log_q(x_s | x_t) with numbers c_t
(the *cotangent*) that are known before any graph is built. `replay_backward` therefore calls backward inside each `step`,
whose graph is freed at once: the exact gradient of the whole trajectory in the activation memory of one network call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import Entry, HasEntry
from diffusion_rtb.chain.noise import GivenStart
from diffusion_rtb.chain.normal import gaussian_kl, output_norm
from diffusion_rtb.chain.recordable import check_single_step
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.seeds import generators, global_seed, seed_of
from diffusion_rtb.chain.teacher_forcing import Mean, TeacherForcing, Visit, Visited
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.interfaces import Prior

__all__ = ["replay", "replay_backward", "rollout", "score", "score_with_means", "score_with_norms", "visit_states"]

LOG_DENSITY = torch.float64
"""Inside the trainer log_q - log_p is a difference of two sums near 1e4 nats (SD at 512 px): see `normal_log_prob`."""


def rollout(
    prior: Prior,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    noise_scale: Callable[[float], float] | None = None,
    needs_noise: bool = True,
) -> Trajectory:
    """Sample one trajectory per prompt from the network as it is now, each from its own seed; no gradients.

    Its noise depends on its seed only, whatever its batch, and is the same for prior and posterior. Steps that the scheduler
    leaves to the ODE are the prior's.

    Args:
        prior: Samples the posterior, or the prior inside `with prior.as_prior()`.
        prompts: One prompt per trajectory, (batch,).
        seeds: One seed per trajectory, (batch,).
        noise_scale: Exploration, see `TrajectoryRecorder`.
        needs_noise: False lets samplers draw whose steps have none; what they draw has no density.

    Returns:
        The trajectories, with float64 log-densities in nats.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"rollout got {len(prompts)} prompts and {len(seeds)} seeds; it needs one seed per prompt.")
    pipe, rows = prior.pipe, generators(seeds)
    call = only_latents(pipe) | prior.arguments(prompts) | {"generator": rows}
    recorder = TrajectoryRecorder(
        pipe.scheduler,
        noise_scale=noise_scale,
        dtype=LOG_DENSITY,
        generators=rows,
        prior=prior.as_prior,
        needs_noise=needs_noise,
    )
    with torch.no_grad(), global_seed(seed_of(0, *seeds)), recorder:
        pipe(**call)
    return recorder.trajectory


def score(prior: Prior, prompts: Sequence[str], trajectory: Trajectory) -> Float[Tensor, "batch steps"]:
    """Log-density of each transition under the network as it is now; no gradients, float64, nats."""
    return replay(prior.pipe, trajectory, dtype=LOG_DENSITY, entry=entry_of(prior), call=prior.arguments(prompts))


def score_with_norms(
    prior: Prior, prompts: Sequence[str], trajectory: Trajectory, look: Visit = lambda _: None
) -> tuple[Float[Tensor, "batch steps"], Float[Tensor, "batch steps"]]:
    """`score`, and `output_norm` of each step, for the same network calls; 0 for a step without a density. `look` sees each."""
    rows, norms = dict[int, Tensor](), dict[int, Tensor]()

    def keep(at: Visited) -> None:
        rows[at.step], norms[at.step] = at.log_prob, output_norm(at.output, LOG_DENSITY)
        look(at)

    with torch.no_grad():
        _force(prior.pipe, trajectory, None, LOG_DENSITY, keep, prior.arguments(prompts), entry=entry_of(prior))
    return _table(rows, trajectory, LOG_DENSITY), _table(norms, trajectory, LOG_DENSITY)


def score_with_means(
    prior: Prior, prompts: Sequence[str], trajectory: Trajectory
) -> tuple[Float[Tensor, "batch steps"], Float[Tensor, "batch steps"], Float[Tensor, "batch steps *dims"]]:
    """`score_with_norms`, and the mean of each transition, for the same network calls; 0 for a step without a density."""
    # Not in the states' own dtype: rounded to it, means that are the same would have a KL, and a gradient of it.
    means = torch.zeros_like(trajectory.x[:, 1:], dtype=torch.promote_types(trajectory.x.dtype, torch.float32))

    def keep(at: Visited) -> None:
        means[:, at.step] = at.mean

    return *score_with_norms(prior, prompts, trajectory, keep), means


def visit_states(
    prior: Prior,
    prompts: Sequence[str],
    states: Trajectory,
    steps: Sequence[int],
    visit: Visit,
    *,
    grad: bool = False,
    maps: bool = False,
    mean: Mean | None = None,
) -> None:
    """Evaluate the network at states x[:, i] of these steps, and call `visit` inside each: one network call per step.

    The states need not belong together: noised samples are answered like a recorded chain. With `grad` the visitor takes the
    gradient of each step alone, as `replay_backward` does; it reaches the states too where they require it. With `maps` the
    steps may be such as have no density, whose log_prob is then 0. With `mean` the network's answer is all that is asked of the
    pipeline: means are those that it makes of them, whatever the scheduler is, and log_prob is 0.
    """
    if grad and mean is None:
        check_single_step(prior.pipe.scheduler)
    how: dict[str, Any] = {"entry": entry_of(prior), "stepwise": grad, "maps": maps, "mean": mean}
    with torch.set_grad_enabled(grad):
        _force(prior.pipe, states, steps, LOG_DENSITY, visit, prior.arguments(prompts), **how)


def entry_of(prior: Prior) -> Entry | None:
    """How the prior's pipeline gets to a recorded first state, where the prior says so; see `replay`."""
    return prior.entry if isinstance(prior, HasEntry) else None


def replay(
    pipe: Any,
    trajectory: Trajectory,
    *,
    steps: Sequence[int] | None = None,
    grad: bool = False,
    dtype: torch.dtype = torch.float32,
    entry: Entry | None = None,
    call: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Float[Tensor, "batch steps"]:
    """Log-density of the recorded transitions under the network as it is now, summed over dims, in nats.

        log_prob = replay(pipe, trajectory, prompt="a cat emoji", num_inference_steps=20, eta=1.0)

    A loop of one's own is replayed like a pipeline: an object whose `scheduler` is the one recorded and whose class has a
    `__call__` that runs the loop, or a function with an attribute `scheduler`. It takes each state from what `step` returns.

    Args:
        pipe: The pipeline whose scheduler recorded the trajectory.
        trajectory: What was recorded.
        steps: Indices of the steps to evaluate; the others are skipped and stay 0. Default: all that have a density.
        grad: Keep the graph of all evaluated steps. Memory grows with their number; `replay_backward` needs that of one.
        dtype: Of the log-densities.
        entry: How the pipeline gets to the first state. "latents" passes it as that argument, divided by `init_noise_sigma`;
            "noise" answers the first normal draw of its shape with it; "step" leaves the start to the pipeline and answers
            its first step with it, for one more network evaluation (pipelines that pack or noise `latents` themselves).
            Default: "latents" where the call has this argument, else "noise".
        call: The arguments that the pipeline was called with when it was recorded (prompt, eta, guidance, …).
        **arguments: The same, one by one; those called like an argument of this function only fit into `call`.

    Returns:
        (batch, steps); equal to `trajectory.log_prob` as long as the network is the recorded one.

    Raises:
        ValueError: the pipeline takes another schedule, steps with another standard deviation, evaluates its network at another
            state than the recorded one, or the network answers NaN; the message names the step.
        TypeError: `pipe` has no `scheduler`, or cannot be called.
    """
    rows: dict[int, Tensor] = {}
    given = {**(call or {}), **arguments}
    with torch.set_grad_enabled(grad):
        _force(pipe, trajectory, steps, dtype, lambda at: rows.__setitem__(at.step, at.log_prob), given, entry=entry)
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
    entry: Entry | None = None,
    call: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Float[Tensor, "batch steps"]:
    """Accumulate the gradient of sum(cotangent · log_prob) into the network's parameters, one step's graph at a time.

    With a `kl_cotangent` the gradient of sum(kl_cotangent · KL(q || p)) is added, the KL of each transition in closed form
    from the prior's means `mean_p` (`score_with_means`).

    What the pipeline computes once for all steps (text embeddings) must not require gradients. `entry`, `call` and
    `**arguments` are those of `replay`.

    Returns:
        The log-densities, (batch, steps), detached; nats.

    Raises:
        ValueError: the scheduler is multistep: its mean depends on earlier network outputs, whose graphs are gone; or nothing
            that the network computes requires gradients.
    """
    check_single_step(pipe.scheduler)
    rows: dict[int, Tensor] = {}

    def backward(at: Visited) -> None:
        i, log_prob = at.step, at.log_prob
        if not log_prob.requires_grad:
            raise ValueError(
                "The network's output does not require gradients: make its parameters trainable, and run it without torch.no_grad "
                "(a no_grad that decorates the call is taken off, one inside it is not)."
            )
        total = (cotangent[:, i].to(log_prob) * log_prob).sum()
        if kl_cotangent is not None and mean_p is not None:
            kl = gaussian_kl(at.mean, mean_p[:, i], float(trajectory.std[i]), dtype)
            total = total + (kl_cotangent[:, i].to(kl) * kl).sum()
        total.backward()
        rows[i] = log_prob.detach()

    given = {**(call or {}), **arguments}
    with torch.enable_grad():
        _force(pipe, trajectory, steps, dtype, backward, given, entry=entry, stepwise=True)
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


def only_latents(pipe: Any) -> dict[str, Any]:
    """Stop a pipeline before it decodes, where it can be asked to; a call that says its output type itself keeps it."""
    return {"output_type": "latent"} if "output_type" in inspect.signature(_loop(pipe)).parameters else {}


def _loop(pipe: Any) -> Callable[..., Any]:
    """The call of a pipeline, or of a loop of one's own, without the no_grad that decorates it.

    Raises:
        TypeError: there is no scheduler to look at, or nothing to call.
    """
    if not hasattr(pipe, "scheduler") or not callable(pipe):
        raise TypeError(
            f"replay got {type(pipe).__name__!r}: give the pipeline itself, an object with the recorded scheduler as "
            "`.scheduler` whose class has a `__call__` that runs the loop, or a function with that scheduler as its attribute "
            "`scheduler`."
        )
    if inspect.isfunction(pipe):
        return inspect.unwrap(pipe)
    return functools.partial(inspect.unwrap(type(pipe).__call__), pipe)


def start_at(
    pipe: Any, x_T: Float[Tensor, "batch *dims"], entry: Entry | None, *, draw: bool
) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
    """Arguments, and a block to call the pipeline in, that make it start at a given state; see `replay`.

    Args:
        pipe: A pipeline or a loop.
        x_T: The state.
        entry: How; None for what the pipeline takes.
        draw: For "noise": draw what is replaced all the same, so that generators go on as they would have.
    """
    takes = inspect.signature(_loop(pipe)).parameters
    entry = entry or ("latents" if "latents" in takes else "noise")
    start = x_T / float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))  # which pipelines multiply by
    if entry == "latents":
        return {"latents": start}, nullcontext()
    size = {"batch_size": len(x_T)} if "batch_size" in takes else {}
    return size, GivenStart(start, draw=draw) if entry == "noise" else nullcontext()


def _force(
    pipe: Any,
    trajectory: Trajectory,
    steps: Sequence[int] | None,
    dtype: torch.dtype,
    visit: Visit,
    call: Mapping[str, Any],
    *,
    entry: Entry | None,
    stepwise: bool = False,
    maps: bool = False,
    mean: Mean | None = None,
) -> None:
    """Run the pipeline's own `__call__` along the recorded states; `visit` inside each evaluated step."""
    run, chosen = _loop(pipe), sorted(set(steps or ())) if maps else _steps(trajectory, steps)
    if entry not in (None, *get_args(Entry)):
        raise ValueError(f"entry={entry!r} must be one of {', '.join(map(repr, get_args(Entry)))}, or None.")
    if not chosen:
        return
    forcing = TeacherForcing(
        pipe.scheduler, trajectory, chosen, dtype, visit, stepwise=stepwise, entry=entry, mean=mean
    )
    start, block = start_at(pipe, forcing.x_t, entry, draw=False)
    if isinstance(block, GivenStart):
        forcing.called = block.end
    given = start | dict(call) if "latents" not in start else dict(call) | start
    with forcing.installed(), block:
        run(**only_latents(pipe) | given)
    forcing.finished()
