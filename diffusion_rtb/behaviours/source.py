"""What every behaviour offers to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from diffusion_rtb.actor import Actor, Experience

__all__ = ["Source"]


@runtime_checkable
class Source(Protocol):
    """Draws `count` trajectories for each prompt row, and can be saved and resumed."""

    def draw(self, actor: Actor, rows: Sequence[int], count: int, iteration: int, beta: float) -> Experience:
        """(len(rows)·count) trajectories, those of one row adjacent; whichever of log_q and log_p are known come with them."""

    def tensors(self) -> dict[str, Tensor]:
        """The source's memory, for a checkpoint; empty if it has none."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
