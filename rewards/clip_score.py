"""How well an image fits its prompt, by an image-text model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rewards._models.image_text import check_image_text_model, image_text_model
from rewards._models.network import Dtype
from rewards._models.two_towers import ImageTextReward, TwoTowers

__all__ = ["ClipScore"]

KINDS = ("clip",)


class ClipScore(ImageTextReward):
    r"""r(x) = scale · <e_image(x), e_text(prompt)>, the cosine similarity of image and prompt, in [-scale, scale].

    Images are rounded to 8 bits first, as a saved file would be: r is a step function of the pixels, and the gradient that
    `grad` gives is that of the same score without the rounding.

    Hessel et al., "CLIPScore", 2021, https://arxiv.org/abs/2104.08718, without its cut at 0, which would hide differences.

    Args:
        model: Of open_clip: "emoji-clip" (bundled), an architecture name (with `weights`), a folder with
            `open_clip_config.json`, or `hf-hub:ID`. Of transformers: a hub id such as "openai/clip-vit-base-patch32", or a folder.
        weights: For an architecture name: a local file, or one of open_clip's tags, which downloads.
        scale: Factor on the cosine; the CLIPScore paper has 2.5, logits of OpenAI's models 100.
        grad: Whether r is differentiable in the images.
        dtype: Of the network.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        model: str = "emoji-clip",
        weights: str | None = None,
        *,
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        check_image_text_model(model, weights, KINDS)
        self.model, self.weights = model, weights

    def _load(self) -> TwoTowers:
        return image_text_model(self.model, self.weights, KINDS, batch=self.batch, dtype=self.dtype)

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return self.scale * self.clip.cosines(images, prompts)

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
