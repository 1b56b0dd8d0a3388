"""The sides of an evaluation as weighted points of a feature space, and which points of two sides share their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["Cloud", "clouds_of", "distances", "sizes"]

ROWS = 4_000_000
"""Pairs of points that are held at once: what bounds the memory."""

SPREAD = 2**32
"""More than a prompt's samples."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points with weights; every prompt has the same share of the weight."""

    points: Float[Tensor, "n dim"]
    """float64."""
    weights: Float[Tensor, " n"]
    """They sum to 1."""
    prompt: Int[Tensor, " n"]
    """-1 of images that belong to none."""
    noise: Int[Tensor, " n"]
    """Equal of two points where both were drawn from the same noise: they are not independent. -1: from nothing shared."""

    @property
    def effective(self) -> float:
        """As many points of equal weight know as much: 1 / sum w², at most n."""
        return 1.0 / float(self.weights.square().sum())

    def __getitem__(self, rows: Int[Tensor, " rows"]) -> Cloud:
        """Some of the points, their weights scaled to sum to 1."""
        weights = self.weights[rows]
        return Cloud(self.points[rows], weights / weights.sum(), self.prompt[rows], self.noise[rows])

    def partners(self, other: Cloud) -> Int[Tensor, " n"]:
        """The point of `other` that shares its noise, by number; -1 where there is none."""
        known, order = other.noise.sort()
        at = torch.searchsorted(known, self.noise).clamp(max=len(known) - 1)
        return torch.where((known[at] == self.noise) & (self.noise >= 0), order[at], -1)

    def chunks(self, width: int, rows: Int[Tensor, " rows"] | None = None) -> tuple[Int[Tensor, " chunk"], ...]:
        """Numbers of its points, or of some, so many at a time that pairs with `width` others fit into the memory."""
        rows = torch.arange(len(self.points)) if rows is None else rows
        return rows.split(max(1, ROWS // max(width, 1)))

    @staticmethod
    def of(points: Float[Tensor, "n dim"], weights: Float[Tensor, " n"] | None = None) -> Cloud:
        """Points that belong to no prompt and share no noise; equal weights unless some are given."""
        n = len(points)
        none = torch.full((n,), -1)
        w = (
            torch.full((n,), 1.0 / n, dtype=torch.float64)
            if weights is None
            else weights.double() / weights.double().sum()
        )
        return Cloud(points.detach().double(), w, none, none)


def clouds_of(prior: Drawn, posterior: Drawn, beta: float) -> dict[str, Cloud]:
    """By side: posterior; prior, if there is one; and the re-weighted prior, if beta is known too."""
    found = {"posterior": _cloud(posterior)}
    if len(prior):
        found["prior"] = _cloud(prior)
        if math.isfinite(beta):
            found["reweighted_prior"] = _cloud(prior, beta)
    return found


def _cloud(drawn: Drawn, beta: float = 0.0) -> Cloud:
    """Weights ∝ exp(beta·r) within each prompt."""
    assert drawn.embedding is not None
    rows = drawn.prompt.unique().tolist()
    weights = torch.zeros(len(drawn), dtype=torch.float64)
    noise = torch.zeros(len(drawn), dtype=torch.long)
    for row in rows:
        own = (drawn.prompt == row).nonzero().flatten()
        weights[own] = torch.softmax(beta * drawn.reward[own].double(), 0) / len(rows)
        noise[own] = row * SPREAD + (torch.arange(len(own)) if drawn.index is None else drawn.index[own])
    return Cloud(drawn.embedding.double(), weights, drawn.prompt, noise)


def distances(one: Float[Tensor, "n dim"], other: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """|x_i - y_j|; of many points through products, exact to about 1e-8 of the points' own length."""
    return torch.cdist(one, other)


def sizes(clouds: Mapping[str, Cloud]) -> dict[str, int | float]:
    """How many points each side has, of the re-weighted prior the effective ones."""
    return {
        name: cloud.effective if name == "reweighted_prior" else len(cloud.points) for name, cloud in clouds.items()
    }
