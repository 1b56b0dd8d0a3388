r"""What a residual d = log q - log p* costs, with an optional dead zone, and the log Z at which a group's costs sum to least.

    squared      h(d) = 1/2 d²                                           log Z = mean log w
    huber        h(d) = 1/2 d²                      where |d| <= delta   log Z = mean log w, see `_log_z`
                        delta (|d| - 1/2 delta)     elsewhere
    forward_kl   h(d) = d + exp(-d) - 1                                  log Z = log mean w
    jeffreys     h(d) = 1/2 d² + d + exp(-d) - 1                         log Z = m - 1 + W(exp(1 + M - m))
    dead zone    penalty(d) = max(0, h(d) - h(±sqrt(c)))     nothing is paid, and nothing learned, while d² <= c

m = mean log w, M = log mean w, W Lambert's function. With the squared penalty the last line is 1/2 max(0, d² - c): the loss
clipping of the RTB paper (Venkatraman et al. 2024, arXiv 2405.20971), which keeps an imperfectly fitted prior from being
fitted to its last nat. All of d, delta and sqrt(c) are in nats.

**Which divergence.** Each h is convex with its minimum 0 at d = 0 alone, so that the minimiser is the posterior on anyone's
trajectories, as for RTB. On q's *own* trajectories, with the true log Z and E_q[grad log q] = 0, the expected gradient
E_q[h'(d) grad log q] is that of

    squared      h' = d                 E_q[d grad log q]             = grad KL(q || p*)       mode seeking
    forward_kl   h' = 1 - exp(-d)       -E_q[(p*/q) grad log q]       = grad KL(p* || q)       mode covering
    jeffreys     the sum of both                                      = grad KL(q || p*) + grad KL(p* || q)

On another chain's trajectories it is the gradient of E_b[h(d)]: neither divergence, and the same optimum. Where q misses what
p* has, d << 0, the squared penalty asks d² and forward_kl exp(-d): on trajectories that go there. On q's own there are none, in
practice: the weights p*/q of those that there are have a variance that grows like exp(KL).

**With the log Z of the group** (`log_z: vargrad`) forward_kl is log mean w - mean log w, Jensen's gap between the
importance-weighted bound and the ELBO; its slopes are (1 - n·softmax(log w)_i) / n, and its gradient on q's own trajectories is a
self-normalised estimate of grad KL(p* || q), O(1/n) off in groups of n. No -d exceeds log n: nothing overflows, nothing is
clipped. For a learned log Z it could: where d < -20, on a trajectory that q draws 5e8 times too seldom, h goes on along its
tangent. It stays convex, finite and least at d = 0 alone, and its slope is 5e8 there instead of more. E_q[exp(-d)] = 1 for the true
log Z, so that at most one of 5e8 of q's own trajectories is as far.

Source: f-trajectory balance, 2026, https://arxiv.org/abs/2605.15417: h'(d) = f(u) - u f'(u) + f'(1) at u = exp(-d), with
f(u) = -log u, f(u) = u log u and their sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import huber_loss

from diffusion_rtb.objectives._checks import check_choice
from diffusion_rtb.objectives._groups import group_log_mean_exp, group_mean

__all__ = ["Penalty", "PenaltyKind"]

PenaltyKind = Literal["squared", "huber", "forward_kl", "jeffreys"]

FARTHEST = 20.0
"""-d beyond which exp(-d) goes on along its tangent; nats. Its square, in a gradient's norm, is finite in float32."""

WRIGHT_STEPS = 6
"""Newton's steps for y + log y = a: four are enough for any a in [1, 1e6] and float64."""


@dataclass(frozen=True)
class Penalty:
    """Elementwise cost of a residual d = log q - log p*; nats."""

    kind: str = "squared"
    """One of `PenaltyKind`."""
    huber_delta: float = 1.0
    """Where Huber's parabola turns into a line; nats. Read only by "huber"."""
    dead_zone: float = 0.0
    """c: residuals with d² <= c cost nothing; nats²."""

    def __post_init__(self) -> None:
        check_choice("loss", self.kind, get_args(PenaltyKind))
        if not (math.isfinite(self.huber_delta) and self.huber_delta > 0):
            raise ValueError(
                f"huber_delta must be a positive finite number in the units of the residual, got {self.huber_delta}; "
                'for no bound on the slope use loss="squared".'
            )
        if not (math.isfinite(self.dead_zone) and self.dead_zone >= 0):
            raise ValueError(f"dead_zone must be a finite number >= 0 (0 switches it off), got {self.dead_zone}.")

    def __call__(self, residual: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """max(0, h(residual) - h(±sqrt(dead_zone))) with the residual's sign, elementwise."""
        cost = self.cost(residual)
        if self.dead_zone == 0:
            return cost
        edge = self.cost(torch.copysign(torch.full_like(residual, math.sqrt(self.dead_zone)), residual.detach()))
        return torch.relu(cost - edge)

    def cost(self, residual: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """h(residual), elementwise."""
        if self.kind == "squared":
            return 0.5 * residual**2
        if self.kind == "huber":
            return huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.huber_delta)
        covering = forward_kl(residual)
        return covering if self.kind == "forward_kl" else 0.5 * residual**2 + covering

    def log_z(self, log_w: Float[Tensor, " batch"], member: Bool[Tensor, "groups batch"]) -> Float[Tensor, " groups"]:
        """The log Z of each group at which the sum of h(log Z - log w) is least, no dead zone; huber: that of squared; nats."""
        if self.kind in ("squared", "huber"):
            return group_mean(log_w, member)
        log_mean = group_log_mean_exp(log_w, member)
        if self.kind == "forward_kl":
            return log_mean
        mean = group_mean(log_w, member)
        return mean - 1 + lambert_of_exp(1 + (log_mean - mean).clamp(min=0))


def forward_kl(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """d + exp(-d) - 1, and below d = -20 its tangent."""
    near = torch.where(d < -FARTHEST, -FARTHEST, d)
    # relu, not d - near: its slope is 0 elsewhere, where that of d - near is 5e8 - 5e8.
    return near + torch.expm1(-near) + math.expm1(FARTHEST) * torch.relu(-FARTHEST - d)


def lambert_of_exp(a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """W(exp(a)) for a >= 1, that is, the y with y + log y = a: Newton from below the root of a concave function, monotone."""
    y = a - a.log()
    for _ in range(WRIGHT_STEPS):
        y = y * (1 + a - y.log()) / (1 + y)
    return y
