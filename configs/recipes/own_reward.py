"""A reward of your own: left-right symmetric pictures. Ten lines, no gradient, nothing to register."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def symmetry(images: Tensor, prompts: Sequence[str], scale: float = 1.0) -> Tensor:
    """r(x) = -scale · mean |x - mirrored x|, with scale 100 in per cent; images in [0, 1], (batch, 3, height, width)."""
    return -scale * (images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
