"""Has a tensor been written to since?"""

from __future__ import annotations

from torch import Tensor

__all__ = ["version"]


def version(tensor: Tensor) -> int | None:
    """Changes with every write into it; None where torch does not count them, in inference mode."""
    return None if tensor.is_inference() else tensor._version
