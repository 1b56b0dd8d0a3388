"""Sequential Monte Carlo: particles re-sampled by their values on the way."""

from __future__ import annotations

from typing import Annotated, Any, Unpack

from pydantic import Field, PositiveInt

from diffusion_rtb.steering._aim import Aim, Kind
from diffusion_rtb.steering._method import Drawing, Method
from diffusion_rtb.steering._particles import Particles, resampled

__all__ = ["SMC"]


class SMC(Method):
    r"""Chains of one prompt that are weighed by G_t = exp(beta·(V(x_t) - V(x_before))) and re-sampled where their weights part.

    A Feynman-Kac model: the product of all G is exp(beta·r(x_0)) whatever V is, so the particles approach the posterior
    p(x)·exp(beta·r(x)) / Z as they grow in number, with an error of 1/particles, and exp(log Z) is unbiased for any number.
    Re-sampling is systematic, whenever the effective sample size falls below `threshold`, and once at the end. Particles of one
    group share ancestors: they are samples of the posterior, no independent ones.

    Args:
        particles: Of a group.
        threshold: Share of `particles` below which the effective sample size leads to re-sampling; 0: only at the end, which
            is to re-weight samples of the prior.
        every: Steps from one weighing to the next; each costs one call of the reward for each particle, unless V is learned.
        temper: V = s^temper·r(x0_hat), s the signal's share of x_t. Early x0_hat lie between what x_0 may become, where rewards
            mislead: 0 believes them, and loses by their verdict what it would need later.
        value: V: "reward", as above; "learned", that of a run's `value_gradient`, or `trust_pcl` with a `length`; or "both", see
            `_learned.value_of`. These are not tempered.

    Sources: Gordon, Salmond, Smith 1993, https://doi.org/10.1049/ip-f-2.1993.0015; for diffusion models Wu et al. 2023,
    https://arxiv.org/abs/2306.17775; with r(x0_hat), Singhal et al. 2025, https://arxiv.org/abs/2501.06848
    """

    weighs = True

    def __init__(
        self,
        particles: Annotated[int, Field(ge=2)] = 16,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
        every: PositiveInt = 1,
        temper: Annotated[float, Field(ge=0)] = 2.0,
        value: Kind = "reward",
    ) -> None:
        self.particles = self.kept = particles
        self.threshold = threshold
        self.every = every
        self.temper = temper
        self.value = value

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """See `Method`; the rows of a group end in random order, so that any of them are samples."""
        return Particles(
            pipe.scheduler,
            aim,
            size=self.particles,
            choose=resampled(self.threshold),
            every=self.every,
            temper=self.temper,
            **drawing,
        )
