"""The engine: from a batch to an update of the posterior, as functions of (sampler, batch, cotangent).

    batch -> Terms -> objective -> cotangent dL/dlog_q                                        `loss_of`
          -> replay_backward, micro-batch by micro-batch -> .grad of the posterior            `push_back`
          -> mean over processes -> clip, or refuse -> AdamW                                  `descend`

The objective sees only small tensors. Its gradient with respect to log_q (batch, steps) is pushed through the network one step
at a time, so the exact full-trajectory gradient needs the activation memory of one network call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.forward_process import signal_and_noise
from diffusion_rtb.chain.normal import power_of_two
from diffusion_rtb.chain.rollout import entry_of, replay_backward
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.sections import TrainConfig
from diffusion_rtb.interfaces import Loss, Objective, Terms
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.schedules import dealt, learning_rate_factor
from diffusion_rtb.training.updates.optimizer import own_parameters

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = [
    "check_trainable",
    "clip_gradients",
    "descend",
    "loss_of",
    "push_back",
    "some_steps",
    "step_weights",
    "terms_of",
]

HEADROOM = (1.0, 2.0**10, 2.0**20)
"""How much smaller than 1 the largest cotangent is made. float16 holds 2^-24 to 2^16; in the networks that were tried gradients are
right for a largest cotangent of 2^-12 to 2^8."""


def loss_of(sampler: Sampler, objective: Objective, parts: Sequence[Batch], beta: float) -> tuple[Terms, Loss]:
    """What an objective says of a batch with both log-densities; beta in nats per unit of reward.

    dL/dlog_q is then in `terms.log_q.grad`, and the gradients of what the objective owns in theirs.
    """
    terms = terms_of(sampler, Batch.cat(parts))
    for parameter in own_parameters(objective):
        parameter.grad = None
    with sampler.stopwatch("objective"):
        loss = objective(terms, beta)
        (loss.loss * loss.to_nats).backward()
    return terms, loss


def terms_of(sampler: Sampler, batch: Batch) -> Terms:
    """What an objective sees of a batch with both log-densities."""
    assert batch.log_q is not None
    assert batch.log_p is not None
    trajectory, device = batch.trajectory, sampler.prior.device
    return Terms(
        log_q=batch.log_q.detach().clone().to(device).requires_grad_(),
        log_p=batch.log_p.detach().to(device),
        reward=batch.reward.to(device, batch.log_q.dtype),
        prompt=batch.prompt.to(device),
        x=trajectory.x,
        timesteps=trajectory.timesteps.to(device),
        features=sampler.features(batch.prompt),
        log_behaviour=trajectory.drawn_with.to(device),
        kl=None if batch.kl is None else batch.kl.detach().clone().to(device).requires_grad_(),
        estimate=None if batch.estimate is None else batch.estimate.to(device, batch.log_q.dtype),
        signal=None if batch.estimate is None else _signals(sampler, trajectory, batch.estimate.shape[1]).to(device),
    )


def _signals(sampler: Sampler, trajectory: Trajectory, states: int) -> Float[Tensor, " states"]:
    """s = a²/(a² + b²), the signal's share of x_t, of as many states, evenly spread over the steps."""
    a, b = signal_and_noise(sampler.prior.pipe.scheduler, trajectory.timesteps[:: trajectory.steps // states])
    share: Tensor = a**2 / (a**2 + b**2)
    return share


def push_back(
    sampler: Sampler,
    parts: Sequence[Batch],
    cotangent: Float[Tensor, "batch steps"],
    kl_cotangent: Float[Tensor, "batch steps"] | None = None,
    *,
    weights: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
) -> list[Float[Tensor, "_ steps"]]:
    """The gradient of sum(cotangent · log_q) + sum(kl_cotangent · KL): it replaces `.grad` of the posterior's parameters.

    A half-precision network passes gradients on in its own dtype, where a cotangent of 1e-6 leaves nothing of them in float16
    and one of 1e6 overflows. Everything is linear in the cotangents: they are divided by a power of two near the largest of
    them before, and the gradients, which are float32, multiplied by it afterwards. Neither rounds. Should they overflow on their
    way all the same (a step of tiny deviation), the pass is repeated with smaller ones.

    Args:
        sampler: Whose posterior it is.
        parts: The trajectories, `batch` in all.
        cotangent: dL/dlog_q.
        kl_cotangent: dL/dKL, for objectives that use the closed-form KL.
        weights: One per step, see `step_weights`.
        steps: The steps that get a gradient, re-weighted so that it stays unbiased when they were drawn by `some_steps`; None:
            all.

    Returns:
        log_q of each part as replayed, on the host; 0 at steps that got no gradient.
    """
    scale = step_weights(weights, cotangent)
    if steps is not None:  # unbiased: each step is drawn with probability len(steps)/all
        scale = scale * (int(parts[0].trajectory.stochastic.sum()) / len(steps))
    given = [cotangent] if kl_cotangent is None else [cotangent, kl_cotangent]
    given = [each * scale for each in given]
    unit = power_of_two(max(float(each.abs().max()) for each in given))
    parameters = list(sampler.prior.parameters().values())
    with sampler.stopwatch("backward"):
        for room in HEADROOM:
            for parameter in parameters:
                parameter.grad = None
            replayed = _push_parts(sampler, parts, [each / unit / room for each in given], steps)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if _finite(gradients) or not all(_finite([each]) for each in (*given, *replayed)):
                break
        for gradient in gradients:
            gradient.mul_(unit * room)
    return replayed


def _finite(tensors: Sequence[Tensor]) -> bool:
    """All of them, on one device, which is asked once."""
    found = [torch.isfinite(tensor).all() for tensor in tensors]
    return not found or bool(torch.stack(found).all())


def _push_parts(
    sampler: Sampler, parts: Sequence[Batch], cotangents: Sequence[Tensor], steps: Sequence[int] | None
) -> list[Float[Tensor, "_ steps"]]:
    replayed, start = [], 0
    for part in parts:
        own = [each[start : start + len(part)] for each in cotangents]
        replayed.append(_push_back(sampler, part, own[0], own[1] if len(own) > 1 else None, steps))
        start += len(part)
    return replayed


def _push_back(
    sampler: Sampler,
    part: Batch,
    cotangent: Float[Tensor, "batch steps"],
    kl_cotangent: Float[Tensor, "batch steps"] | None,
    steps: Sequence[int] | None,
) -> Float[Tensor, "batch steps"]:
    rows, device = [], sampler.prior.device
    for chunk in sampler.chunks(len(part)):
        call = sampler.prior.arguments(sampler.texts(part.prompt[chunk]))
        replayed = replay_backward(
            sampler.prior.pipe,
            part.trajectory[chunk].to(device),
            cotangent[chunk],
            steps=steps,
            kl_cotangent=None if kl_cotangent is None else kl_cotangent[chunk],
            mean_p=None if part.mean_p is None else part.mean_p[chunk].to(device),
            dtype=torch.float64,
            entry=entry_of(sampler.prior),
            call=call,
        )
        rows.append(replayed.cpu())
    return torch.cat(rows)


def step_weights(given: Sequence[float] | None, cotangent: Float[Tensor, "batch steps"]) -> Float[Tensor, " steps"]:
    """A preconditioner: steps that decide little of the reward but have large gradients can be kept from drowning the rest.

    Raises:
        ValueError: there is not one weight per step.
    """
    steps = cotangent.shape[1]
    weights = given or (1.0,) * steps
    if len(weights) != steps:
        raise ValueError(
            f"train.step_weights has {len(weights)} entries, the chain has {steps} steps: give one for each, or null."
        )
    return torch.tensor(weights, dtype=cotangent.dtype, device=cotangent.device)


def some_steps(batch: Batch, count: int | None, seed: int) -> list[int] | None:
    """`count` of the steps with a density, drawn at random; None for all of them."""
    dense = batch.trajectory.stochastic.nonzero().flatten()
    if count is None or count >= len(dense):
        return None
    return dealt(dense.tolist(), count, 1, seed)[0]


def check_trainable(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Refuse trainable parameters of half precision.

    Raises:
        ValueError: there are some: AdamW's squares of their gradients underflow, and an update below 1/256 of a bfloat16 weight
            (1/2048 of a float16 one) changes nothing.
    """
    half = [name for name, parameter in parameters.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise ValueError(
            f"{len(half)} trainable parameters are half precision, first {half[0]!r} ({parameters[half[0]].dtype}): small updates "
            "would be rounded away. Keep the adapters in float32: parameter.data = parameter.data.float()."
        )


def descend(optimizer: torch.optim.Optimizer, train: TrainConfig, iteration: int, processes: Processes) -> float:
    """An update by the mean gradient of all processes; the posterior's is clipped. Returns the norm that it had.

    No DDP wrapper sees these gradients, because backward runs inside the sampler.

    Raises:
        NotFiniteError: the gradient is; the parameters are as they were.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    given = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter, mean in zip(given, processes.mean([parameter.grad for parameter in given]), strict=True):
        parameter.grad = mean
    norm = clip_gradients(optimizer.param_groups[0]["params"], train.grad_clip, iteration)
    factor = learning_rate_factor(train, iteration)
    for group, rate in zip(optimizer.param_groups, (train.lr, train.lr_objective), strict=False):
        group["lr"] = rate * factor
    with doing("updating the parameters"):
        optimizer.step()
    return norm


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float, iteration: int) -> float:
    """Scale the gradient down to a norm of `limit` where it is larger; returns the norm that it had.

    Raises:
        NotFiniteError: the norm is.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    if not torch.isfinite(norm):
        raise NotFiniteError(
            f"The gradient norm is {float(norm)} at iteration {iteration}; the parameters were left as they were. Lower "
            "train.lr or beta, or score in float32."
        )
    return float(norm)
