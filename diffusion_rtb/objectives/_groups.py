"""Means over the trajectories of one prompt."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Baseline", "group_baseline", "group_std"]

Baseline = Literal["mean", "leave_one_out"]

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, nats: equal rewards up to rounding are no reason to move."""


def group_baseline(
    values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], kind: Baseline = "mean"
) -> Float[Tensor, " batch"]:
    """The mean of each trajectory's group, with or without the trajectory itself; units of `values`. See `check_groups`."""
    n = check_groups("A baseline", prompt)
    mean = mean_of_group(values, prompt)
    if kind == "mean":
        return mean
    return mean - (values - mean) / (n - 1)  # = (n·mean - value) / (n - 1), without the cancellation


def check_groups(what: str, prompt: Int[Tensor, " batch"], otherwise: str = "") -> Int[Tensor, " batch"]:
    """The size of each trajectory's group; ValueError where one is alone: it has nothing to be compared with."""
    member, rows = same_prompt(prompt)
    sizes = member.sum(dim=1)
    if bool((sizes < 2).any()):
        single = rows[sizes < 2].tolist()
        raise ValueError(
            f"{what} compares the trajectories of one prompt: prompt {single[0]} has a group of size 1 ({len(single)} of "
            f"{len(rows)} prompts in the batch do). Draw at least 2 trajectories per prompt (train.group){otherwise}."
        )
    return torch.where(member, sizes[:, None], 0).sum(dim=0)


def group_std(reward: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """Standard deviation of each trajectory's group (divided by n), plus a floor of 1e-4 nats; reward units."""
    centred = reward - group_baseline(reward, prompt)
    return group_baseline(centred.square(), prompt).sqrt() + STD_FLOOR / beta


def mean_of_group(values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The mean of each trajectory's group; units of `values`."""
    member, _ = same_prompt(prompt)
    return torch.where(member, group_mean(values, member)[:, None], 0).sum(dim=0)


def same_prompt(prompt: Int[Tensor, " batch"]) -> tuple[Bool[Tensor, "groups batch"], Int[Tensor, " groups"]]:
    """Which trajectories belong to each of the batch's prompts, and which rows of the prompt table these are."""
    rows = torch.unique(prompt)
    return rows[:, None] == prompt[None, :], rows


def group_mean(values: Float[Tensor, " batch"], member: Bool[Tensor, "groups batch"]) -> Float[Tensor, " groups"]:
    """Mean of the values of each group."""
    # A masked sum, not index_add: that one adds in a different order on every run on a GPU.
    return torch.where(member, values, 0).sum(dim=1) / member.sum(dim=1)


def group_log_mean_exp(
    values: Float[Tensor, " batch"], member: Bool[Tensor, "groups batch"]
) -> Float[Tensor, " groups"]:
    """log of the mean of exp(values) of each group; units of `values`, which are nats."""
    return torch.where(member, values, -torch.inf).logsumexp(dim=1) - member.sum(dim=1).to(values.dtype).log()
