"""What every behaviour offers to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Source"]


@runtime_checkable
class Source(Protocol):
    """Draws `count` trajectories for each prompt row, and can be saved and resumed.

    What `draw` does is repeatable: called again in the same iteration, it answers the same. What a source is to remember of an
    iteration it is told by `settle`, which is not called for one that failed.
    """

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """(len(rows)·count) trajectories, those of one row adjacent; whichever of log_q and log_p are known come with them."""

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """An iteration has succeeded on these trajectories, by the name of their source; both log-densities are known."""

    def tensors(self) -> dict[str, Tensor]:
        """The source's memory, for a checkpoint; empty if it has none."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
