"""A reward for pictures and videos alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def brightness_of_all(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of all pixels, of all frames."""
    return images.flatten(1).mean(1)
