"""What networks expect of images: resize, crop, normalise; on tensors, with the pixels of the published pipelines.

Networks were trained and published on 8-bit files, so images are rounded to 8 bits first, and again where Pillow rounds.
HPSv2 alone makes the 8-bit file floats before it resizes. Values are those of the published pipeline whether or not gradients
are wanted; gradients pass straight through the rounding: they are those of the same resize in floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torchvision.transforms.functional as TF
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode

from rewards._models.resample import SUPPORT, resize

PIL_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as processors of transformers write them."""


@dataclass(frozen=True)
class Preprocess:
    """Images in [0, 1] -> what a network was trained on, pixel for pixel as its own transform on PIL images does.

    `shortest` resizes so that the image covers `resize`, `longest` so that it fits into it, `squash` to exactly it. `fit` is
    `longest` as HPSv2 computes it: floats, neither rounded nor clamped after the resize, so that bicubic overshoot leaves
    [0, 1]; the shorter side, too, is rounded in another way where it comes out at half a pixel.
    """

    resize: tuple[int, int]
    """Height and width, pixels."""
    crop: tuple[int, int]
    """Height and width cut from the centre; what is missing is filled with `fill`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mode: Literal["shortest", "longest", "fit", "squash"] = "shortest"
    fill: float = 0.0
    """In [0, 1], before `mean` is subtracted."""
    crop_rounds: Literal["even", "down"] = "even"
    """Where an odd margin is split: torchvision rounds half a pixel to even, transformers down."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 network_height network_width"]:
        resize = resized_in_floats if self.mode == "fit" else resized
        images = resize(images.float(), self._size(*images.shape[2:]), self.interpolation)
        for axis, length in ((2, self.crop[0]), (3, self.crop[1])):
            images = self._fitted(images, axis, length)
        return TF.normalize(images, list(self.mean), list(self.std))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if self.mode == "squash":
            return self.resize
        if self.mode == "shortest" and self.resize[0] == self.resize[1]:
            short = self.resize[0]  # torchvision rounds the longer side down
            return (short, short * width // height) if height <= width else (short * height // width, short)
        if self.mode == "fit":
            scale = min(self.resize) / max(height, width)
            return max(round(height * scale), 1), max(round(width * scale), 1)
        choose = max if self.mode == "longest" else min
        ratio = choose(height / self.resize[0], width / self.resize[1])
        return max(round(height / ratio), 1), max(round(width / ratio), 1)

    def _fitted(self, images: Tensor, axis: int, length: int) -> Tensor:
        """Padded to, or cut from the centre at, `length` pixels along an axis."""
        margin = images.shape[axis] - length
        if margin < 0:
            before, after = -margin // 2, -margin - -margin // 2
            return pad(images, (before, after) if axis == 3 else (0, 0, before, after), value=self.fill)
        return images.narrow(axis, margin // 2 if self.crop_rounds == "down" else round(margin / 2), length)

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

    @staticmethod
    def of_transformers(config: Mapping[str, Any]) -> Preprocess:
        """From an image processor's `preprocessor_config.json`, as `to_dict()` of the processor completes it.

        Raises:
            ValueError: it asks for something else than resize, centre crop and normalise.
        """
        size = config["size"]
        filter: Any = PIL_FILTERS.get(int(config["resample"]))
        wanted = all(config.get(key, True) for key in ("do_resize", "do_rescale", "do_normalize"))
        if filter is None or not wanted or not ("shortest_edge" in size or {"height", "width"} <= size.keys()):
            raise ValueError(
                f"The image processor does {dict(config)}; read are those that resize to a shortest edge or a height and "
                "width by nearest, bilinear or bicubic, rescale, crop the centre and normalise."
            )
        squash = "shortest_edge" not in size
        resize = (size["height"], size["width"]) if squash else _pair(size["shortest_edge"])
        crop = (config["crop_size"]["height"], config["crop_size"]["width"]) if config.get("do_center_crop") else resize
        return Preprocess(
            resize,
            crop,
            _triple(config["image_mean"]),
            _triple(config["image_std"]),
            filter,
            "squash" if squash else "shortest",
            crop_rounds="down",
        )


def resized(
    images: Float[Tensor, "batch 3 height width"],
    size: tuple[int, int],
    interpolation: Literal["bicubic", "bilinear", "nearest"],
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """What Pillow makes of the images' 8-bit files, in [0, 1]; gradients are those of the resize in floats.

    An image with a NaN or an infinity comes out as NaN: it must not turn into a black one that has a reward.
    """
    exact = _levels(images.detach(), size, interpolation).float() / 255
    exact += 0 * images.detach().sum((1, 2, 3), keepdim=True)
    if not (torch.is_grad_enabled() and images.requires_grad):
        return exact
    smooth = _smooth(images, size, interpolation).clamp(0, 1)  # bicubic overshoots
    return exact + (smooth - smooth.detach())


def resized_in_floats(
    images: Float[Tensor, "batch 3 height width"],
    size: tuple[int, int],
    interpolation: Literal["bicubic", "bilinear", "nearest"],
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """What torchvision makes of the images' 8-bit files as float tensors, antialiased; not bounded by [0, 1].

    An image with a NaN or an infinity comes out as NaN.
    """
    exact = resized(images.detach(), (images.shape[2], images.shape[3]), interpolation)
    if torch.is_grad_enabled() and images.requires_grad:
        exact = exact + (images - images.detach())
    return _smooth(exact, size, interpolation)


def _smooth(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if size == images.shape[2:]:
        return images
    return TF.resize(images, list(size), InterpolationMode(interpolation), antialias=True)


def _levels(images: Tensor, size: tuple[int, int], interpolation: Any) -> Tensor:
    levels = images.clamp(0, 1).mul_(255).round_().nan_to_num_(0.0).to(torch.uint8)
    if size == images.shape[2:]:
        return levels
    if interpolation in SUPPORT:
        return resize(levels, size, interpolation)
    return TF.resize(levels, list(size), InterpolationMode(interpolation))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def _triple(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64).expand(3).tolist())
