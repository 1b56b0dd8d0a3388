"""Which of the stored trajectories to draw: weights by reward, and a draw that follows weights closely."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["rank_weights", "systematic_draw", "systematic_resample"]

RANK = 0.01
"""k below: the best one in a hundred share the highest weights."""


def rank_weights(reward: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 / (k·n + rank), rank 0 for the highest reward: the same whatever the scale of the reward, and never 0.

    With k = 0.01 the best tenth of a full buffer gets half of the draws.

    Sources: Tripp, Daxberger, Hernández-Lobato 2020, https://arxiv.org/abs/2006.09191; in the replay buffers of diffusion
    samplers, Sendera et al. 2024, https://arxiv.org/abs/2402.05098, and their code.
    """
    n = len(reward)
    rank = torch.empty(n, dtype=torch.float64)
    order = torch.argsort(reward.cpu(), descending=True, stable=True)
    rank[order] = torch.arange(n, dtype=torch.float64)
    return 1 / (RANK * n + rank)


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
