"""What networks expect of images, as a differentiable path on tensors: resize, crop, normalise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torchvision.transforms.functional as TF
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import InterpolationMode


@dataclass(frozen=True)
class Preprocess:
    """Images in [0, 1] -> what a network was trained on, as its own transform on PIL images does up to 8-bit rounding.

    `shortest` resizes so that the image covers `resize`, `longest` so that it fits into it, `squash` to exactly it.
    """

    resize: tuple[int, int]
    """Height and width, pixels."""
    crop: tuple[int, int]
    """Height and width cut from the centre; what is missing is filled with `fill`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: float = 0.0

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 network_height network_width"]:
        images = images.float()
        size = self._size(*images.shape[2:])
        if size != images.shape[2:]:
            how = InterpolationMode(self.interpolation)
            images = TF.resize(images, list(size), how, antialias=True).clamp(0, 1)  # bicubic overshoots
        images = TF.center_crop(images - self.fill, list(self.crop)) + self.fill  # center_crop fills with 0
        return TF.normalize(images, list(self.mean), list(self.std))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if self.mode == "squash":
            return self.resize
        if self.mode == "shortest" and self.resize[0] == self.resize[1]:
            short = self.resize[0]  # torchvision rounds the longer side down
            return (short, short * width // height) if height <= width else (short * height // width, short)
        choose = max if self.mode == "longest" else min
        ratio = choose(height / self.resize[0], width / self.resize[1])
        return round(height / ratio), round(width / ratio)

    def resized(self, side: int) -> Preprocess:
        """The same for a square network input of `side` pixels, without a margin that is cut off."""
        return replace(self, resize=(side, side), crop=(side, side))

    @staticmethod
    def of_open_clip(config: Mapping[str, Any]) -> Preprocess:
        """From the `preprocess_cfg` of an open_clip model."""
        size = _pair(config["size"])
        return Preprocess(
            resize=size,
            crop=size,
            mean=_triple(config["mean"]),
            std=_triple(config["std"]),
            interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            mode=config["resize_mode"],
            fill=config["fill_color"] / 255 if config["resize_mode"] == "longest" else 0.0,
        )

    @staticmethod
    def of_torchvision(transform: Any) -> Preprocess:
        """From the transform that comes with a torchvision architecture's published weights."""
        side = transform.resize_size[0]
        how = transform.interpolation.value
        return Preprocess((side, side), _pair(transform.crop_size), tuple(transform.mean), tuple(transform.std), how)

    @staticmethod
    def of_timm(config: Mapping[str, Any]) -> Preprocess:
        """From `timm.data.resolve_model_data_config`."""
        height, width = config["input_size"][1:]
        mode: Any = {"center": "shortest", "squash": "squash", "border": "longest"}[config["crop_mode"]]
        resize = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
        return Preprocess(
            resize, (height, width), _triple(config["mean"]), _triple(config["std"]), config["interpolation"], mode
        )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def _triple(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64).expand(3).tolist())
