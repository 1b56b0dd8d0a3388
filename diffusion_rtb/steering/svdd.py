"""Value-weighted choice among several proposals at every step."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Unpack

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from diffusion_rtb.steering._aim import Aim, Kind
from diffusion_rtb.steering._method import Drawing, Method
from diffusion_rtb.steering._particles import Particles

__all__ = ["SVDD"]


class SVDD(Method):
    r"""Of `particles` proposals x_s ~ p(x_s | x_t) of each sample one goes on, drawn with probability ∝ exp(beta·V(x_s)).

    As proposals grow in number a step becomes p(x_s | x_t)·exp(beta·V(x_s)) / E_p[exp(beta·V(x_s)) | x_t], the posterior's own
    where V is the soft value. With another V, r(x0_hat) among them, it becomes another chain, and nothing later makes up for it:
    that is what `smc` keeps weights for. With choice "best" the best proposal goes on, as in the paper's code: beta is then
    infinite, and no number of proposals leads to the posterior.

    The end is weighed by the reward. While proposals are drawn, exp(log Z) is unbiased, of a larger variance than that of `smc`.

    Args:
        particles: Proposals; each costs a call of the network per step.
        choice: "drawn", or "best".
        value: See `SMC`.
        temper: See `SMC`.
        every: Steps from one choice to the next.

    Source: Li et al. 2024, https://arxiv.org/abs/2408.08252
    """

    weighs = True

    def __init__(
        self,
        particles: Annotated[int, Field(ge=2)] = 8,
        choice: Literal["drawn", "best"] = "drawn",
        value: Kind = "reward",
        temper: Annotated[float, Field(ge=0)] = 2.0,
        every: PositiveInt = 1,
    ) -> None:
        self.particles = particles
        self.choice = choice
        self.value = value
        self.temper = temper
        self.every = every

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """See `Method`; all rows of a group answer its one sample."""
        return Particles(
            pipe.scheduler,
            aim,
            size=self.particles,
            choose=_one if self.choice == "drawn" else _best,
            every=self.every,
            temper=self.temper,
            weighs=self.choice == "drawn",
            **drawing,
        )


def _one(log_w: Float[Tensor, " size"], generator: torch.Generator, end: bool) -> Int[Tensor, " size"]:
    return torch.multinomial(torch.softmax(log_w, 0), 1, generator=generator).repeat(len(log_w))


def _best(log_w: Float[Tensor, " size"], generator: torch.Generator, end: bool) -> Int[Tensor, " size"]:
    return log_w.argmax().repeat(len(log_w))
