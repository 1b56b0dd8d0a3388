"""Draw indices with given weights and as little noise as possible."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["systematic_draw", "systematic_resample"]


def systematic_draw(weights: Float[Tensor, " n"], count: int, seed: int) -> Int[Tensor, " count"]:
    """`systematic_resample` with its random number drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return systematic_resample(weights, count, float(torch.rand((), generator=generator, dtype=torch.float64)))


def systematic_resample(weights: Float[Tensor, " n"], count: int, u: float) -> Int[Tensor, " count"]:
    """Indices drawn with probability ∝ weights, each index at most one away from count·weight times.

    Args:
        weights: Non-negative, not all zero.
        count: How many to draw.
        u: In [0, 1); the one random number of the scheme (Kitagawa 1996, doi 10.2307/1390750).
    """
    edges = (weights.double() / weights.double().sum()).cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + u) / count
    return torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)
