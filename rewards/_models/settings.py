"""What the rewards that run a network have in common: batch size, precision, and whether gradients are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

__all__ = ["Dtype", "check_settings", "gradients_if_asked"]

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a network's weights and activations; scores are float32 in any case."""

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")

Call = TypeVar("Call", bound=Callable[..., Tensor])


def check_settings(batch: int, dtype: str = "float32", scale: float = 1.0) -> None:
    """Refuse bad values; ValueError."""
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least 1 image per network call.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: use one of {DTYPES}.")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale is {scale}: it must be finite and not 0 (1.0 leaves the score as it is).")


def gradients_if_asked(call: Call) -> Call:
    """A reward's `__call__` with d r / d images where its attribute `grad` is true and the caller records gradients.

    Otherwise nothing is recorded, so that scoring samples never holds activations. The value is the same up to rounding.
    """

    @wraps(call)
    def wrapped(self: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return call(self, images, prompts)

    return wrapped  # type: ignore[return-value]
