"""Adjoints of a batch of the posterior's own trajectories, for objectives that aim by them (`ReadsAdjoint`).

    adjoint(x_0) = -beta·grad r(x_0)
    lean   adjoint(x_t) = J_p(x_t)ᵀ adjoint(x_s)
    full   adjoint(x_t) = J_q(x_t)ᵀ (adjoint(x_s) + d(x_t)) - J_p(x_t)ᵀ d(x_t),    d = (mean_q - mean_p) / std²

One step's graph at a time, like `pathwise.py`, whose gradient in x_t the full adjoint is. Lean: a call of the prior with its
gradient per step. Full: one more of the prior, and one of the posterior with its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.normal import power_of_two
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.updates.pathwise import Chain, slopes

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["with_adjoint"]


def with_adjoint(sampler: Sampler, part: Batch, beta: float, *, lean: bool) -> Batch:
    """The same with `adjoint`: [:, i] is that of the state which step i leads to, on the host; nats per unit of x."""
    with sampler.stopwatch("reward"):
        slope = slopes(sampler, part, beta)
    unit = power_of_two(float(slope.abs().max()))
    with sampler.stopwatch("backward"):
        found = [
            _Adjoints(sampler, part[chunk], unit, lean=lean).along(slope[chunk]) for chunk in sampler.chunks(len(part))
        ]
    return replace(part, adjoint=torch.cat(found))


@dataclass(eq=False)
class _Adjoints:
    """Of one micro-batch.

    Args:
        sampler: Whose posterior drew it.
        part: Its trajectories.
        unit: What adjoints are divided by on their way, for networks in half precision.
        lean: Leave out the posterior's shifts.
    """

    sampler: Sampler
    part: Batch
    unit: float
    lean: bool

    def along(self, slope: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch steps *dims"]:
        """From that of x_0, for every state that a step leads to."""
        prior = self.sampler.prior
        states = self.part.trajectory.to(prior.device)
        chain = Chain(self.sampler, self.sampler.texts(self.part.prompt), states, self.unit)
        chain.look([] if self.lean else range(states.steps))
        adjoint, found = slope.to(prior.device) / self.unit, []
        for i in reversed(range(states.steps)):
            found.append((adjoint * self.unit).cpu())
            if i > 0:  # x_T is nobody's next state
                adjoint = chain.lean(i, adjoint) if self.lean else chain.full(i, adjoint)
        return torch.stack(found[::-1], 1)
