"""What the rewards that run a network have in common: batch size, precision, scale, and whether gradients are wanted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase

__all__ = ["Dtype", "NetworkReward"]

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a network's weights and activations; scores are float32 in any case."""

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


class NetworkReward(TwoPhase, ABC):
    """A reward with d r / d images where `grad` is true and the caller records gradients.

    Otherwise nothing is recorded, so that scoring samples never holds activations. The value is the same up to rounding.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, *, batch: int, dtype: Dtype, grad: bool, scale: float = 1.0) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}: at least 1 image per network call.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: use one of {DTYPES}.")
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"scale is {scale}: it must be finite and not 0 (1.0 leaves the score as it is).")
        self.batch, self.dtype, self.grad, self.scale = batch, dtype, grad, scale

    @property
    def no_gradient(self) -> str:
        """It has one where `grad` is true."""
        return "" if self.grad else "its argument grad is false: set grad: true"

    @property
    def precision(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return getattr(torch, self.dtype)

    @abstractmethod
    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """r, scaled; differentiable."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.forward(images, prompts)
