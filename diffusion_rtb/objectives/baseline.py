"""What policy gradients share: group baselines, clipped ratios to the chain that drew, and the numbers that are logged.

A *group* is the trajectories of one prompt in the batch. A baseline that does not depend on the trajectory it is subtracted
from leaves the expected gradient as it is, because E_q[grad log q] = 0:

    mean            mean of the group, the trajectory itself included: (n - 1)/n times the gradient, in a group of n
    leave_one_out   mean of the others: the gradient itself
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives.checks import check_terms
from diffusion_rtb.objectives.log_z import group_mean, log_weight, same_prompt

__all__ = [
    "Baseline",
    "behaviour",
    "check_choice",
    "check_clip_range",
    "check_policy_terms",
    "check_positive",
    "clipped_loss",
    "group_baseline",
    "group_std",
    "report",
]

Baseline = Literal["mean", "leave_one_out"]
BASELINES = ("mean", "leave_one_out")

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, nats: equal rewards up to rounding are no reason to move."""


def group_baseline(
    values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], kind: Baseline = "mean"
) -> Float[Tensor, " batch"]:
    """The mean of each trajectory's group, with or without the trajectory itself; units of `values`.

    Raises:
        ValueError: a group of one trajectory: it has nothing to be compared with.
    """
    member, rows = same_prompt(prompt)
    sizes = member.sum(dim=1)
    if bool((sizes < 2).any()):
        single = rows[sizes < 2].tolist()
        raise ValueError(
            f"A baseline compares the trajectories of one prompt: prompt {single[0]} has a group of size 1 ({len(single)} of "
            f"{len(rows)} prompts in the batch do). Draw at least 2 trajectories per prompt (train.group)."
        )
    mean = mean_of_group(values, prompt)
    if kind == "mean":
        return mean
    n = torch.where(member, sizes[:, None], 0).sum(dim=0)
    return mean - (values - mean) / (n - 1)  # = (n·mean - value) / (n - 1), without the cancellation


def group_std(reward: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """Standard deviation of each trajectory's group (divided by n), plus a floor of 1e-4 nats; reward units."""
    centred = reward - group_baseline(reward, prompt)
    return group_baseline(centred.square(), prompt).sqrt() + STD_FLOOR / beta


def behaviour(terms: Terms) -> Float[Tensor, "batch steps"]:
    """Log-density of the transitions under the chain that drew them: the posterior as it is now where nothing else is known."""
    return (terms.log_q if terms.log_behaviour is None else terms.log_behaviour).detach()


def clipped_loss(
    log_q: Float[Tensor, "batch steps"],
    log_behaviour: Float[Tensor, "batch steps"],
    advantage: Float[Tensor, "batch #steps"],
    clip_range: float,
) -> Float[Tensor, " batch"]:
    r"""sum_t max(-A·rho_t, -A·clip(rho_t, 1 - c, 1 + c)), rho_t = exp(log_q - log_behaviour), of each trajectory.

    Where rho = 1, at the first update after drawing, its gradient is that of -A·log_q. A step whose ratio has left the range
    in the direction that A asks for gets no gradient.

    Args:
        log_q: posterior log-densities, summed over dims; nats.
        log_behaviour: those of the chain that drew the trajectories; nats.
        advantage: one per trajectory or one per step, detached.
        clip_range: c, on ratios of densities summed over dims.

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347.
    """
    ratio = torch.exp(log_q - log_behaviour)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped).sum(dim=1)


def report(loss: Float[Tensor, ""], terms: Terms, beta: float, to_nats: float = 1.0) -> Loss:
    """The answer of an objective without a log Z of its own: residuals against the group's mean log w, as under VarGrad.

    In a group of one they are 0 and say nothing; what needs larger groups asks for them in `group_baseline`.
    """
    log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta).detach()
    log_z = mean_of_group(log_w, terms.prompt)
    return Loss(loss, log_z - log_w, log_z, to_nats)


def mean_of_group(values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The mean of each trajectory's group; units of `values`."""
    member, _ = same_prompt(prompt)
    return torch.where(member, group_mean(values, member)[:, None], 0).sum(dim=0)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value itself, where it is allowed.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def check_clip_range(clip_range: float) -> float:
    """The clip range itself.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < clip_range < 1:
        raise ValueError(
            f"clip_range must be between 0 and 1, got {clip_range}: ratios are kept within 1 - clip_range and 1 + clip_range. "
            "Log-densities are sums over dimensions here; a range meant for their mean is multiplied by their number."
        )
    return clip_range


def check_policy_terms(terms: Terms, beta: float, *, uses_kl: bool = False) -> None:
    """`check_terms`, and the same for the behaviour's densities and the closed-form KL, where they are read.

    Raises:
        ValueError: see `check_terms`; or the closed-form KL is missing.
    """
    check_terms(terms, beta)
    if uses_kl and terms.kl is None:
        raise ValueError(
            "This objective needs the closed-form KL of each transition (Terms.kl), which the trainer computes for objectives "
            "with `uses_kl`; it is None."
        )
    optional = {"log_behaviour": terms.log_behaviour} | ({"kl": terms.kl} if uses_kl else {})
    for name, values in optional.items():
        if values is None:
            continue
        if values.shape != terms.log_q.shape:
            raise ValueError(
                f"{name} has the shape {tuple(values.shape)}, but log_q is {tuple(terms.log_q.shape)}: it is not broadcast."
            )
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            row, step = (int(part) for part in bad.nonzero()[0])
            number = float(values.detach()[row, step])
            remedy = "Check the standard deviation of that step, or score in float32."
            raise ValueError(f"{name} of trajectory {row}, step {step}, is {number}. {remedy}")


def check_positive(name: str, value: float) -> float:
    """The value itself.

    Raises:
        ValueError: it is not a positive finite number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value}.")
    return value
