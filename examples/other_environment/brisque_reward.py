"""BRISQUE, a picture's naturalness without a reference, as a reward on numpy arrays.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", 2012,
https://doi.org/10.1109/TIP.2012.2214050. The package `brisque` brings the trained weights; it needs numpy 1 and unpickles a file
of its own when it starts, two reasons to keep it in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Brisque"]


class Brisque:
    """r(x) = -BRISQUE(x) / scale; BRISQUE is about 0 (natural) to 100 (distorted).

    Args:
        scale: BRISQUE points per unit of reward.
    """

    def __init__(self, scale: float = 10.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}: it must be positive.")
        self.scale = scale

    def load_weights(self) -> None:
        """Read the weights, once the arguments were found to be right."""
        from brisque import BRISQUE

        self.model: Any = BRISQUE(url=False)

    def __call__(self, images: np.ndarray[Any, Any], prompts: Sequence[str]) -> np.ndarray[Any, Any]:
        pixels = np.rint(images.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
        return np.array([-self.model.score(image) / self.scale for image in pixels], dtype=np.float64)
