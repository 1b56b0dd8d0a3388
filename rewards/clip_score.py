"""How well an image fits its prompt, by an image-text model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rewards._open_clip import OpenClip

__all__ = ["ClipScore"]


class ClipScore:
    r"""r(x) = scale · <e_image(x), e_text(prompt)>, the cosine similarity of image and prompt, in [-scale, scale].

    Hessel et al., "CLIPScore", 2021, https://arxiv.org/abs/2104.08718, without its cut at 0, which would hide differences.

    Args:
        model: "emoji-clip" (bundled), an architecture name of open_clip (with `weights`), a folder with
            `open_clip_config.json`, or `hf-hub:ID`.
        weights: For an architecture name: a local file, or one of open_clip's tags, which downloads.
        scale: Factor on the cosine; the CLIPScore paper has 2.5, logits of OpenAI's models 100.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self, model: str = "emoji-clip", weights: str | None = None, *, scale: float = 1.0, batch: int = 64
    ) -> None:
        self.check(model, weights, scale=scale, batch=batch)
        self.scale = scale
        self.clip = OpenClip(model, weights, batch=batch)

    @staticmethod
    def check(model: str = "emoji-clip", weights: str | None = None, *, scale: float = 1.0, batch: int = 64) -> None:
        """Refuse bad arguments without loading anything; FileNotFoundError or ValueError."""
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"scale is {scale}: it must be finite and not 0 (1.0 leaves the cosine as it is).")
        OpenClip.check(model, weights, batch=batch)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        return self.scale * (self.embed(images) * self.clip.texts(prompts, images.device)).sum(1)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of the images: the space in which diversity is measured."""
        return self.clip.images(images)

    @torch.no_grad()
    def classify(
        self, images: Float[Tensor, "batch 3 height width"], classes: Sequence[str]
    ) -> Float[Tensor, "batch classes"]:
        """Zero-shot log p(class | image), nats, for one prompt per class."""
        return self.clip.log_probs(images, classes)
