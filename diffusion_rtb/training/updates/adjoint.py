"""Adjoints of a batch of the posterior's own trajectories, for objectives that aim by them (`ReadsAdjoint`).

    adjoint(x_0) = -beta·grad r(x_0)
    lean   adjoint(x_t) = J_p(x_t)ᵀ adjoint(x_s)
    full   adjoint(x_t) = J_q(x_t)ᵀ (adjoint(x_s) + d(x_t)) - J_p(x_t)ᵀ d(x_t),    d = (mean_q - mean_p) / std²

One step's graph at a time, like `pathwise.py`, whose gradient in x_t the full adjoint is. Lean: a call of the prior with its
gradient per step. Full: one more of the prior, and one of the posterior with its gradient.
"""

from __future__ import annotations

from dataclasses import replace
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
        found = [_along(sampler, part[chunk], slope[chunk], unit, lean=lean) for chunk in sampler.chunks(len(part))]
    return replace(part, adjoint=torch.cat(found))


def _along(
    sampler: Sampler, part: Batch, slope: Float[Tensor, "batch *dims"], unit: float, *, lean: bool
) -> Float[Tensor, "batch steps *dims"]:
    """Of one micro-batch, from that of x_0; divided by `unit` on its way, for networks in half precision."""
    states = part.trajectory.to(sampler.prior.device)
    chain = Chain(sampler, sampler.texts(part.prompt), states, unit)
    backwards = range(states.steps - 1, 0, -1)  # x_T is nobody's next state
    if not lean:
        chain.look(backwards)
    adjoint = slope.to(sampler.prior.device) / unit
    found = [adjoint]
    for i in backwards:
        adjoint = chain.lean(i, adjoint) if lean else chain.full(i, adjoint)
        found.append(adjoint)
    return unit * torch.stack(found[::-1], 1).cpu()
