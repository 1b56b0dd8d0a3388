"""Images of any aspect ratio as a sequence of patches, as SigLIP 2 NaFlex takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchvision.transforms.functional as TF
from jaxtyping import Float
from torch import Tensor

from rewards._models.preprocess import PIL_FILTERS, resized

__all__ = ["Naflex"]

TOLERANCE = 1e-5
"""Of the published search for the scale."""


@dataclass(frozen=True)
class Naflex:
    """Images in [0, 1] -> resized to at most `patches_at_most` square patches, keeping the aspect ratio up to whole patches.

    Tschannen et al., "SigLIP 2", 2025, https://arxiv.org/abs/2502.14786, section 2.4.2.
    """

    patch: int
    """Side of a patch, pixels."""
    patches_at_most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bilinear"

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 network_height network_width"]:
        images = resized(images.float(), self.size(*images.shape[2:]), self.interpolation)
        return TF.normalize(images, list(self.mean), list(self.std))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize: whole patches, as many as allowed."""
        low, high = TOLERANCE / 10, 100.0  # the published bisection: its tolerance is part of the result
        while high - low >= TOLERANCE:
            middle = (low + high) / 2
            rows, columns = self._patches(height, middle), self._patches(width, middle)
            low, high = (middle, high) if rows * columns <= self.patches_at_most else (low, middle)
        return self._patches(height, low) * self.patch, self._patches(width, low) * self.patch

    def _patches(self, length: int, scale: float) -> int:
        return max(math.ceil(length * scale / self.patch), 1)

    def patches(self, pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """The network's arguments. Images of one batch are alike, so no patch is padding."""
        batch, channels, height, width = pixels.shape
        rows, columns = height // self.patch, width // self.patch
        grid = pixels.reshape(batch, channels, rows, self.patch, columns, self.patch)
        sequence = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        return {
            "pixel_values": sequence,
            "pixel_attention_mask": torch.ones(sequence.shape[:2], dtype=torch.int32, device=pixels.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch),
        }

    @staticmethod
    def of_transformers(config: Mapping[str, Any]) -> Naflex:
        """From a `Siglip2ImageProcessor`'s `to_dict()`; ValueError if it is none."""
        try:
            return Naflex(
                patch=config["patch_size"],
                patches_at_most=config["max_num_patches"],
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                interpolation=PIL_FILTERS[int(config["resample"])],  # type: ignore[arg-type]
            )
        except KeyError as error:
            raise ValueError(f"The image processor does {dict(config)}, without {error}: it is not NaFlex's.") from None
