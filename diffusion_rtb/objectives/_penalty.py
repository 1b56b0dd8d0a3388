r"""What a residual costs: its half square, or Huber's bounded-slope version, with an optional dead zone.

    squared   h(d) = 1/2 d²
    huber     h(d) = 1/2 d²                      where |d| <= delta
                     delta (|d| - 1/2 delta)     elsewhere
    dead zone penalty(d) = max(0, h(d) - h(sqrt(c)))      nothing is paid, and nothing learned, while d² <= c

With the squared penalty the last line is 1/2 max(0, d² - c): the loss clipping of the RTB paper (Venkatraman et al.
2024, arXiv 2405.20971), which keeps an imperfectly fitted prior from being fitted to its last nat. All of d, delta and
sqrt(c) are in the units in which the objective states its residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from diffusion_rtb.objectives._checks import check_choice

__all__ = ["Penalty"]

KINDS = ("squared", "huber")


@dataclass(frozen=True)
class Penalty:
    """Elementwise cost of a residual."""

    kind: str = "squared"
    """"squared" or "huber"."""
    huber_delta: float = 1.0
    """Where Huber's parabola turns into a line; units of the residual. Read only by "huber"."""
    dead_zone: float = 0.0
    """c: residuals with d² <= c cost nothing; units of the residual, squared."""

    def __post_init__(self) -> None:
        check_choice("loss", self.kind, KINDS)
        if not (math.isfinite(self.huber_delta) and self.huber_delta > 0):
            raise ValueError(
                f"huber_delta must be a positive finite number in the units of the residual, got {self.huber_delta}; "
                'for no bound on the slope use loss="squared".'
            )
        if not (math.isfinite(self.dead_zone) and self.dead_zone >= 0):
            raise ValueError(f"dead_zone must be a finite number >= 0 (0 switches it off), got {self.dead_zone}.")

    def __call__(self, residual: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """max(0, h(residual) - h(sqrt(dead_zone))), elementwise."""
        cost = self.cost(residual)
        if self.dead_zone == 0:
            return cost
        edge = self.cost(torch.full_like(residual, math.sqrt(self.dead_zone)))
        return torch.relu(cost - edge)

    def cost(self, residual: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """h(residual), elementwise."""
        if self.kind == "squared":
            return 0.5 * residual**2
        return huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.huber_delta)
