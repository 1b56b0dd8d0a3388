"""Which samples of a prompt are compared, and what is said of each pair."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.objectives._groups import same_prompt

__all__ = ["Labels", "Pairs", "labelled", "paired"]

Labels = Literal["soft", "hard"]
Pairs = Literal["all", "best_worst"]


def labelled(labels: Labels, nats: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """y of each pair from how much better its first is: soft, sigma(nats); hard, 1, 0, or 1/2 where they are equal."""
    if labels == "soft":
        return torch.sigmoid(nats)
    return torch.heaviside(nats, nats.new_tensor(0.5))


def paired(
    pairs: Pairs, prompt: Int[Tensor, " batch"], reward: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Both of each pair, as rows of the batch, and its weight: prompts have the same say, however many pairs; sum 1."""
    groups = [_of_group(pairs, row.nonzero().flatten(), reward) for row in same_prompt(prompt)[0]]
    first, second = torch.cat(groups).unbind(1)
    weights = [one.new_full((len(one),), 1 / len(one) / len(groups), dtype=torch.float64) for one in groups]
    return first, second, torch.cat(weights)


def _of_group(pairs: Pairs, member: Int[Tensor, " group"], reward: Float[Tensor, " batch"]) -> Int[Tensor, "pairs two"]:
    if pairs == "all":
        return torch.combinations(member)
    best = int(reward[member].argmax())
    # Of equal rewards two different samples all the same: a pair of one with itself would say nothing.
    worst = int(reward[member].flip(0).argmin())
    return member[[best, len(member) - 1 - worst]][None]
