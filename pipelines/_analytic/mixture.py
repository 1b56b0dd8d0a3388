"""Gaussian mixtures with one variance for all modes: density, samples, and which mode a vector belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.densities import normalised, numbers

__all__ = ["Mixture"]

WITHIN = 4.0
"""Standard deviations from the nearest mean within which a vector belongs to a mode; 0.03 % of a mode's own lie outside in 2-D."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights_k N(x; means_k, variance·I); float64."""

    means: Float[Tensor, "modes dim"]
    weights: Float[Tensor, " modes"]
    """Sum 1; a mode may have weight 0."""
    variance: float

    @staticmethod
    def of(means: Sequence[Sequence[float]], weights: Sequence[float] | None, variance: float) -> Mixture:
        """Checked parameters; weights are all equal where None, and rounded ones are made to sum to 1.

        Raises:
            ValueError: shapes do not fit, means coincide, a number is not finite, the variance is not positive, a weight is
                negative, or the weights do not sum to 1.
        """
        m = numbers("means", means, 2)
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"variance={variance}: it must be positive and finite, for example 0.3.")
        return Mixture(m, normalised(weights, len(m), zero=True), float(variance))

    def weighted(self, modes: Sequence[Sequence[float]], weights: Sequence[float] | None) -> Mixture:
        """The same modes with other weights: those given (None: all equal), and 0 for every other mode.

        Raises:
            ValueError: a point is no mode of this mixture, or the weights are impossible.
        """
        if len(modes) == 0:
            raise ValueError("modes is empty: give at least one of the prior's means.")
        w = normalised(weights, len(modes), zero=True)
        points = torch.as_tensor(modes, dtype=torch.float64)
        if points.ndim != 2 or points.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"modes have shape {tuple(points.shape)}: give one point of {self.means.shape[1]} numbers each."
            )
        distance, index = torch.cdist(points, self.means).min(1)
        for point, apart in zip(points.tolist(), distance.tolist(), strict=True):
            if apart > 1e-6 * math.sqrt(self.variance):
                raise ValueError(f"{point} is no mode of the prior, whose means are {self.means.tolist()}.")
        if len(index.unique()) < len(index):
            raise ValueError(f"modes has a point twice: {points.tolist()}.")
        return replace(self, weights=torch.zeros(len(self.means), dtype=torch.float64).index_put((index,), w))

    def log_prob(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """log-density; nats."""
        squares = torch.cdist(x.double(), self.means, compute_mode="donot_use_mm_for_euclid_dist").square()
        constant = -0.5 * self.means.shape[1] * math.log(2 * math.pi * self.variance)
        return (self.weights.log() - squares / (2 * self.variance)).logsumexp(1) + constant

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
        """Exact, independent samples."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[mode] + math.sqrt(self.variance) * noise

    def mode(self, x: Float[Tensor, "batch dim"], within: float = WITHIN) -> Int[Tensor, " batch"]:
        """Nearest mode of each vector, or -1 ("off") where it is more than `within` standard deviations away."""
        distance, index = torch.cdist(x.double().cpu(), self.means).min(1)
        return torch.where(distance <= within * math.sqrt(self.variance), index, -1)

    def shares(self, x: Float[Tensor, "batch dim"], within: float = WITHIN) -> Float[Tensor, " modes_and_off"]:
        """Share of the vectors in each mode, and last the share that is in none."""
        mode = self.mode(x, within)
        counts = torch.bincount(torch.where(mode < 0, len(self.means), mode), minlength=len(self.means) + 1)
        return counts.double() / len(mode)
