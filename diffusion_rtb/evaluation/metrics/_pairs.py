r"""Means over pairs of points that are independent: what distances and kernels between two sides are averaged with.

Of a mixture of P prompts, each with the same share, E f(x, y) = (1/P²) sum over prompts p, p' of E f(x_p, y_p'). A pair that is
one and the same sample, or two of the same noise, is left out, and its block of one prompt is scaled up instead, so that without
weights the mean is unbiased however many samples each prompt has. Self-normalised weights make it so in the limit only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.evaluation.bootstrap import resampled_counts
from diffusion_rtb.evaluation.metrics._clouds import Cloud

__all__ = ["Weighting", "interval_of", "pair_means", "resampled"]

Values = Callable[[Tensor, Tensor], Tensor]
"""(n, dim) and (m, dim) -> (n, m), a number for each pair."""

Weighting = Float[Tensor, "replicates n"]
"""The weights of the points themselves, and below them those of each bootstrap replicate."""


def resampled(cloud: Cloud, replicates: int, seed: int) -> Weighting:
    """The weights, then those of so many resamplings within each prompt: weight times how often a point was drawn.

    Two clouds of the same samples get the same draws from the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    found = cloud.weights.repeat(replicates + 1, 1)
    for row in cloud.prompt.unique().tolist():
        own = (cloud.prompt == row).nonzero().flatten()
        drawn = found[1:, own] * resampled_counts(len(own), replicates, generator)
        # A replicate may miss every point that carries weight; it is then left without any.
        share = cloud.weights[own].sum() / drawn.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        found[1:, own] = drawn * share
    return found


def pair_means(
    values: Values,
    one: Cloud,
    other: Cloud,
    weights: tuple[Float[Tensor, "replicates n"], Float[Tensor, "replicates m"]] | None = None,
    *,
    within: bool = False,
) -> Float[Tensor, " replicates"]:
    r"""sum w_i·v_j·f(x_i, y_j) / sum w_i·v_j over pairs that share no noise, prompt by prompt; see above.

    Args:
        values: f.
        one, other: The two sides; the same one twice gives the mean over its own pairs i ≠ j.
        weights: One row per mean; None: the clouds' own.
        within: Only pairs of the same prompt, mean over prompts.

    Returns:
        One mean per row of weights; NaN where no pair is left.
    """
    w, v = weights or (one.weights[None], other.weights[None])
    partner = torch.arange(len(one.points)) if one is other else one.partners(other)
    total = torch.zeros(len(w), dtype=torch.float64)
    prompts = one.prompt.unique().tolist()
    for prompt in prompts:
        rows, columns = ((cloud.prompt == prompt).nonzero().flatten() for cloud in (one, other))
        seen = columns if within else torch.arange(len(other.points))
        block = torch.zeros(
            3, len(w), dtype=torch.float64
        )  # of this prompt: all pairs; those sharing noise, and their weight
        for chunk in one.chunks(len(seen), rows):
            pairs = values(one.points[chunk], other.points[seen])
            if not within:
                total += _weighted(pairs, w[:, chunk], v)
            own = pairs if within else pairs[:, columns]
            block += _block(own, w[:, chunk], v[:, columns], _places(partner[chunk], columns))
        share = w[:, rows].sum(1) * v[:, columns].sum(1)
        mean = (block[0] - block[1]) / (share - block[2])
        if within:
            total += mean / len(prompts)
        elif len(columns):
            total += share * mean - block[0]
    return total


def _weighted(pairs: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return ((v @ pairs.T) * w).sum(1)


def _places(partner: Tensor, columns: Tensor) -> Tensor:
    """Where each partner stands among the columns; -1 where it does not."""
    if len(columns) == 0:
        return torch.full_like(partner, -1)
    at = torch.searchsorted(columns, partner).clamp(max=len(columns) - 1)
    return torch.where(columns[at] == partner, at, -1)


def _block(pairs: Tensor, w: Tensor, v: Tensor, place: Tensor) -> Float[Tensor, "3 replicates"]:
    rows = (place >= 0).nonzero().flatten()
    both = w[:, rows] * v[:, place[rows]]
    return torch.stack([_weighted(pairs, w, v), both @ pairs[rows, place[rows]], both.sum(1)])


def interval_of(values: Float[Tensor, " replicates"], confidence: float) -> dict[str, float]:
    """The first as `mean`, quantiles of the others as `low` and `high`: a percentile bootstrap interval."""
    if len(values) == 1:
        return {"mean": float(values[0]), "low": float("nan"), "high": float("nan")}
    tail = (1.0 - confidence) / 2
    ends = values[1:].nanquantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return {"mean": float(values[0]), "low": float(ends[0]), "high": float(ends[1])}
