r"""Uncertainty by resampling: how far a number could have fallen elsewhere with other samples of the same prompts.

Resampling is within each prompt (stratified): the prompts are those of the run, only the samples are random. It draws
from its own generator, so the same seed gives the same interval and no other randomness moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.estimates import refuse_nan, reweighted_mean

__all__ = [
    "Interval",
    "bootstrap_interval",
    "percentile_interval",
    "quantile_intervals",
    "resampled_counts",
    "resampled_means",
    "reweighted_interval",
]


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
        ValueError: no values, a NaN among them, `confidence` outside (0, 1) or `n` < 1.
    """
    if len(values) == 0:
        raise ValueError("A bootstrap needs at least one value, got none.")
    check_bootstrap(confidence, n)
    refuse_nan(values)
    values = values.detach().double().cpu()
    rows = torch.zeros(len(values), dtype=torch.long) if groups is None else groups.cpu()
    means = torch.stack([values[rows == row].mean() for row in rows.unique().tolist()])
    replicates = resampled_means(values[:, None], rows, n, seed=seed)[..., 0].mean(0)
    return percentile_interval(float(means.mean()), replicates, confidence)


def reweighted_interval(
    values: Float[Tensor, " batch"],
    log_w: Float[Tensor, " batch"],
    confidence: float,
    n: int,
    *,
    groups: Int[Tensor, " batch"],
    seed: int = 0,
) -> Interval:
    """`estimates.reweighted_mean` with its interval: samples are resampled together with their weights.

    It errs on the narrow side where few of them carry the weight, as no replicate holds what no sample was.
    """
    w = _weights(log_w, groups)
    means = resampled_means(torch.stack([w * values.double().cpu(), w], dim=1), groups, n, seed=seed)
    # A replicate may miss every sample that carries weight; its mean is then 0 rather than NaN.
    ratio = means[..., 0] / means[..., 1].clamp_min(torch.finfo(torch.float64).tiny)
    return percentile_interval(reweighted_mean(values, log_w, groups), ratio.mean(0), confidence)


def quantile_intervals(
    values: Float[Tensor, " batch"],
    shares: Sequence[float],
    confidence: float,
    n: int,
    *,
    groups: Int[Tensor, " batch"],
    log_w: Float[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> list[Interval]:
    """Quantiles within each group, mean over groups, each with its bootstrap interval.

    A quantile is the smallest value that at least this share of the (re-weighted) samples do not exceed: one of the samples.

    Args:
        values: One number per sample.
        shares: In (0, 1).
        confidence: In (0, 1).
        n: Replicates.
        groups: The prompt of each sample.
        log_w: Of each sample, for those of the re-weighted samples; None: all count the same.
        seed: Of the resampling.
    """
    generator, rows = torch.Generator().manual_seed(seed), groups.cpu()
    values, w = values.detach().double().cpu(), _weights(torch.zeros(len(groups)) if log_w is None else log_w, groups)
    found = []
    for row in rows.unique().tolist():
        ordered, order = values[rows == row].sort()
        counts = resampled_counts(len(ordered), n, generator)
        weights = torch.cat([torch.ones_like(counts[:1]), counts]) * w[rows == row][order]
        below = weights.cumsum(1)
        # A hair less, for what is a whole number of samples but for rounding.
        wanted = (1 - 1e-12) * torch.tensor(shares, dtype=torch.float64) * below[:, -1:]
        found.append(ordered[torch.searchsorted(below, wanted).clamp(max=len(ordered) - 1)])
    mean = torch.stack(found).mean(0)
    return [percentile_interval(float(each[0]), each[1:], confidence) for each in mean.T]


def _weights(log_w: Tensor, groups: Tensor) -> Float[Tensor, " batch"]:
    """exp(log_w) up to a factor of each group; their largest is 1."""
    log_w, rows = log_w.detach().double().cpu(), groups.cpu()
    most = {row: log_w[rows == row].max() for row in rows.unique().tolist()}
    return (log_w - torch.stack([most[row] for row in rows.tolist()])).exp()


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
