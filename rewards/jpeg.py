"""The size of an image as a JPEG file: a reward without weights."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from rewards._levels import broken_is_nan, levels

__all__ = ["Jpeg"]

KILOBYTE = 1000


class Jpeg(TwoPhase):
    r"""r(x) = -size(x) (compressibility) or +size(x) (incompressibility) of the JPEG file of the image.

    With the defaults the rewards of Black et al., "Training Diffusion Models with Reinforcement Learning", 2023,
    https://arxiv.org/abs/2305.13301: kilobytes of 1000 bytes at quality 95. Headers, about 0.6 kB, are included.

    Args:
        sign: "compress" rewards small files, "incompress" large ones.
        unit: "kilobytes"; or "bits_per_pixel", which compares across image sizes.
        quality: Of the encoder, 1 to 95.
    """

    no_gradient = "the size of a file is a whole number of bytes"

    def __init__(
        self,
        sign: Literal["compress", "incompress"] = "compress",
        *,
        unit: Literal["kilobytes", "bits_per_pixel"] = "kilobytes",
        quality: int = 95,
    ) -> None:
        for name, value, known in (
            ("sign", sign, ("compress", "incompress")),
            ("unit", unit, ("kilobytes", "bits_per_pixel")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: use one of {known}.")
        if not 1 <= quality <= 95:
            raise ValueError(f"quality is {quality}: JPEG encoders take 1 to 95 (95 is the default).")
        self.sign = {"compress": -1.0, "incompress": 1.0}[sign]
        self.unit, self.quality = unit, quality

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        one = KILOBYTE if self.unit == "kilobytes" else images.shape[2] * images.shape[3] / 8
        sizes = [self.sign * self._bytes(image) / one for image in levels(images)]
        return broken_is_nan(torch.tensor(sizes, dtype=torch.float32), images)

    def _bytes(self, image: Tensor) -> int:
        from PIL import Image

        with io.BytesIO() as file:
            Image.fromarray(image.numpy()).save(file, format="JPEG", quality=self.quality)
            return file.tell()
