"""Resizing as Pillow resizes 8-bit images, to the last bit, on tensors of any device.

Published preprocessing was fixed on Pillow images. On a CPU Pillow itself does it. It works in integers: one pass along each
axis, weights in units of 2^-22, every pass rounded to 8 bits. The same integers on other devices give the same pixels, where
floats are off by up to 3 levels.

Rows are resized before columns, as in every Pillow up to 12 and so in what was published. Pillow 13 takes columns first for
many images whose height shrinks (python-pillow/Pillow#9549); their pixels differ from it by the rounding in between.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

__all__ = ["SUPPORT", "resize", "resize_in_integers"]

SUPPORT = {"bicubic": 2, "bilinear": 1}
"""Half the width of each filter, in input pixels of an image that is not made smaller."""

UNIT = 22
"""Weights are integers in units of 2^-22."""


def resize(
    levels: UInt8[Tensor, "batch channels height width"], size: tuple[int, int], filter: Literal["bicubic", "bilinear"]
) -> UInt8[Tensor, "batch channels new_height new_width"]:
    """What `PIL.Image.resize` makes of 8-bit images.

    Args:
        levels: 0 to 255; three channels.
        size: New height and width, pixels.
        filter: Bicubic (a = -1/2) or bilinear; both cover all pixels under the filter when the image gets smaller.
    """
    if levels.device.type == "cpu" and len(levels):
        return torch.stack([_by_pillow(image, size, filter) for image in levels])
    return resize_in_integers(levels, size, filter)


def _by_pillow(image: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    from PIL import Image

    how = Image.Resampling[filter.upper()]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((size[1], picture.height), how).resize((size[1], size[0]), how)  # rows first, always
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resize_in_integers(
    levels: UInt8[Tensor, "batch channels height width"], size: tuple[int, int], filter: Literal["bicubic", "bilinear"]
) -> UInt8[Tensor, "batch channels new_height new_width"]:
    """The same as `resize`, computed on the tensor's device."""
    found = levels.to(torch.int32)
    for axis, length in ((3, size[1]), (2, size[0])):  # rows first: rounding in between makes the order matter
        if length != found.shape[axis]:
            found = _along(axis, found, length, filter)
    return found.to(torch.uint8)


def _along(axis: int, levels: Tensor, length: int, filter: str) -> Tensor:
    index, weight = (x.to(levels.device) for x in _taps(levels.shape[axis], length, filter))
    front = levels.movedim(axis, 0)
    flat = front.reshape(len(front), -1).contiguous()  # whole rows are gathered: fast only where they lie together
    total = torch.full((length, flat.shape[1]), 1 << (UNIT - 1), dtype=torch.int32, device=levels.device)
    for k in range(index.shape[1]):
        total.addcmul_(flat[index[:, k]], weight[:, k, None])
    return (total >> UNIT).clamp_(0, 255).reshape(length, *front.shape[1:]).movedim(0, axis)


@lru_cache(maxsize=64)
def _taps(length: int, new_length: int, filter: str) -> tuple[Int[Tensor, "new taps"], Int[Tensor, "new taps"]]:
    """Which pixels make up each new pixel, and their weights in units of 2^-22; unused taps weigh 0."""
    scale = length / new_length
    widening = max(scale, 1.0)
    reach = SUPPORT[filter] * widening
    taps = 2 * math.ceil(reach) + 1
    index = torch.zeros(new_length, taps, dtype=torch.int64)
    weight = torch.zeros(new_length, taps, dtype=torch.int32)
    for i in range(new_length):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), length)
        values = [_kernel((x - centre + 0.5) * (1.0 / widening), filter) for x in range(first, last)]
        factor = 1.0 / sum(values)
        index[i, : last - first] = torch.arange(first, last)
        weight[i, : last - first] = torch.tensor([_fixed(value * factor) for value in values], dtype=torch.int32)
    return index, weight


def _kernel(x: float, filter: str) -> float:
    x = abs(x)
    if filter == "bilinear":
        return max(1.0 - x, 0.0)
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _fixed(value: float) -> int:
    """To the nearest unit, halves away from 0."""
    return int(value * (1 << UNIT) + (0.5 if value >= 0 else -0.5))
