r"""Uncertainty by resampling: how far a number could have fallen elsewhere with other samples of the same prompts.

Resampling is within each prompt (stratified): the prompts are those of the run, only the samples are random. It draws
from its own generator, so the same seed gives the same interval and no other randomness moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "percentile_interval", "resampled_counts", "resampled_means"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval, low <= high."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, " batch"],
    confidence: float = 0.95,
    n: int = 1000,
    *,
    seed: int = 0,
    groups: Int[Tensor, " batch"] | None = None,
) -> Interval:
    """Percentile bootstrap interval of the mean over groups of the group means.

    Args:
        values: one number per sample.
        confidence: in (0, 1), e.g. 0.95.
        n: number of bootstrap replicates.
        seed: of the resampling.
        groups: the prompt of each sample; None means one group.

    Raises:
        ValueError: no values, `confidence` outside (0, 1) or `n` < 1.
    """
    if len(values) == 0:
        raise ValueError("A bootstrap needs at least one value, got none.")
    check_bootstrap(confidence, n)
    values = values.detach().double().cpu()
    rows = torch.zeros(len(values), dtype=torch.long) if groups is None else groups.cpu()
    means = torch.stack([values[rows == row].mean() for row in rows.unique().tolist()])
    replicates = resampled_means(values[:, None], rows, n, seed=seed)[..., 0].mean(0)
    return percentile_interval(float(means.mean()), replicates, confidence)


def resampled_means(
    values: Float[Tensor, "batch numbers"], groups: Int[Tensor, " batch"], n: int, *, seed: int = 0
) -> Float[Tensor, "groups n numbers"]:
    """Means of each group in each of `n` resamplings with replacement within it: of what all else can be made of means."""
    generator, values = torch.Generator().manual_seed(seed), values.detach().double().cpu()
    replicates = []
    for row in groups.unique().tolist():
        group = values[groups.cpu() == row]
        replicates.append(resampled_counts(len(group), n, generator) @ group / len(group))
    return torch.stack(replicates)


def percentile_interval(estimate: float, replicates: Float[Tensor, " n"], confidence: float) -> Interval:
    """The interval between the quantiles of an estimate's replicates; those that are NaN say nothing, and all of them NaN."""
    tail = (1.0 - confidence) / 2
    ends = replicates.nanquantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return Interval(estimate, float(ends[0]), float(ends[1]))


def check_bootstrap(confidence: float, n: int) -> None:
    """Raise ValueError unless `confidence` is in (0, 1) and `n` at least 1."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, e.g. 0.95, got {confidence}.")
    if n < 1:
        raise ValueError(f"The number of bootstrap replicates must be at least 1, got {n}.")


def resampled_counts(size: int, n: int, generator: torch.Generator) -> Float[Tensor, "n size"]:
    """How often each of `size` samples is drawn in each of `n` resamplings with replacement; rows sum to `size`."""
    drawn = torch.randint(size, (n, size), generator=generator)
    return torch.zeros(n, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n, size, dtype=torch.float64))
