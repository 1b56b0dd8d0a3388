"""A scheduler's timesteps on the host: pipelines put them on the device, where each look at one waits for the network.

A scheduler's `step` looks its timestep up, compares it and indexes tables on the CPU with it: ten waits for a step of DDIM. What is
on the device for the network stays there; only the scheduler sees the copies, which have the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffusion_rtb.versions import version

__all__ = ["HostSchedule", "place_in"]


class HostSchedule:
    """Copies of the timesteps that a scheduler has and is called with, one wait per schedule.

    Args:
        scheduler: Whose they are.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        # LCM multiplies its sample by numbers made of the timestep, and half precision rounds those otherwise on the device.
        self.exact = not hasattr(scheduler, "get_scalings_for_boundary_condition_discrete")
        self._copies: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def copy(self, t: Tensor) -> Tensor:
        """The same numbers on the host; a timestep is looked up in the copy of the schedule that it is a view of."""
        whole = t if t._base is None else t._base
        if whole.device.type == "cpu" or not whole.is_contiguous():
            return t.cpu()
        known = self._copies.get(id(whole))
        if known is None or known[1] != version(whole):
            known = self._copies[id(whole)] = whole, version(whole), whole.cpu()
        return known[2].as_strided(t.size(), t.stride(), t.storage_offset() - whole.storage_offset())

    def part(self, schedule: Tensor, places: Sequence[int]) -> Tensor:
        """The entries of a schedule at these places, beside it; nothing is copied for it in either direction."""
        found = torch.stack([schedule[place] for place in places])
        self._copies[id(found)] = found, version(found), self.copy(schedule)[list(places)]
        return found

    @contextmanager
    def shown(self, timesteps: Tensor | None = None) -> Iterator[None]:
        """Inside the block the scheduler sees its schedule, or another one, on the host."""
        scheduler = self.scheduler
        own = getattr(scheduler, "timesteps", None)
        shown = own if timesteps is None else timesteps
        if isinstance(shown, Tensor):
            scheduler.timesteps = self.copy(shown) if self.exact else shown
        try:
            yield
        finally:
            if own is not None:
                scheduler.timesteps = own


def place_in(schedule: Shaped[Tensor, " all"], timesteps: Float[Tensor, " steps"]) -> int | None:
    """Where a recorded chain begins in a schedule of which it is a part; the last place if several fit, None if none does."""
    found, recorded = schedule.double().cpu(), timesteps.double().cpu()
    if len(recorded) > len(found):
        return None
    fits = torch.isclose(found.unfold(0, len(recorded), 1), recorded, rtol=1e-5, atol=1e-4).all(1)
    return int(fits.nonzero()[-1]) if fits.any() else None
