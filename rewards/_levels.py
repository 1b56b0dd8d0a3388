"""Images as 8-bit levels, for rewards that work on files: JPEG encoders, text recognition."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["broken_is_nan", "levels"]


def levels(images: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    """The nearest of 256 levels, on the CPU; what is not a number becomes 0, so see `broken_is_nan`."""
    rounded = (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round()
    return rounded.to("cpu", torch.uint8).permute(0, 2, 3, 1)


def broken_is_nan(
    values: Float[Tensor, " batch"], images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """`values` on the images' device; NaN, which stops a run, for images with a NaN or an infinity in them.

    A broken image has levels as well, usually black ones, and a black image is a small file: it must not be rewarded for it.
    """
    return values.to(images.device) + 0 * images.detach().float().sum((1, 2, 3))
