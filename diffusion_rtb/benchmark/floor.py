"""The rounding floor: the KL that a network of this dtype reports although nothing was learned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.training.rounding_floor import rounding_floor

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["measure_floor"]


def measure_floor(subject: Subject, part: Part) -> dict[str, Any]:
    """In nats, of the whole chain; see `training/rounding_floor.py`.

    Weights that are random round like others of their size, but their chain visits other states: an order of magnitude.
    """
    sampler = subject.sampler(part.batch)
    own = sampler.draw(subject.rows(part.batch), list(range(part.batch)))
    return {"nats": rounding_floor(sampler, own), "dimensions": math.prod(subject.prior.dims)}
