"""Count the images that a reward scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["RewardCalls", "counted", "note"]


class RewardCalls:
    """How many images a reward has scored."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward
        self.count = 0


_counting: list[RewardCalls] = []


@contextmanager
def counted(calls: RewardCalls) -> Iterator[RewardCalls]:
    """Add to `calls` what its reward scores inside the block; not what rewards inside it are asked, nor judges of the same kind."""
    _counting.append(calls)
    try:
        yield calls
    finally:
        _counting.remove(calls)


def note(reward: Any, images: int) -> None:
    """Tell whoever counts that the reward has scored so many images."""
    for calls in _counting:
        if calls.reward is reward:
            calls.count += images
