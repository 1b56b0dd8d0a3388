"""The best of n independent samples."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor

from diffusion_rtb.steering._aim import Aim
from diffusion_rtb.steering._method import Drawing, Method
from diffusion_rtb.steering._particles import Particles

__all__ = ["BestOf"]


class BestOf(Method):
    r"""Of each `particles` samples the one with the highest reward. It needs no noise, no density and no x0_hat.

    What it samples is no posterior: the density of the best of n is n·p(x)·F(r(x))^(n - 1), F the distribution of r under p,
    whatever beta is. Its KL from p is log n - (n - 1)/n at most, reached where no two rewards are equal. log Z comes besides, from
    all rewards: log mean exp(beta·r), whose exponential is unbiased.

    Args:
        particles: n.

    Source: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; the KL, Beirami et al. 2024, https://arxiv.org/abs/2401.01879
    """

    needs_noise = False

    def __init__(self, particles: PositiveInt = 16) -> None:
        self.particles = particles

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """See `Method`; all rows of a group answer its best."""
        return Particles(
            pipe.scheduler,
            aim,
            size=self.particles,
            choose=_best,
            every=None,
            needs_noise=False,
            **drawing,
        )


def _best(log_w: Float[Tensor, " size"], generator: torch.Generator, end: bool) -> Int[Tensor, " size"]:
    return log_w.argmax().repeat(len(log_w))
