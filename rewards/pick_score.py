"""PickScore: which image people would pick for a prompt, by a CLIP ViT-H/14 tuned on their picks."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from rewards._models.network import Dtype
from rewards._models.transformers_clip import TransformersClip, check_transformers_clip
from rewards._models.two_towers import ImageTextReward

__all__ = ["PickScore"]

MODEL, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(ImageTextReward):
    r"""r(x) = scale · exp(logit_scale) · <e_image(x), e_text(prompt)>: logits, for most images 18 to 24.

    For two images of one prompt, sigmoid(r_1 - r_2) is the probability that people prefer the first.

    Kirstain et al., "Pick-a-Pic", 2023, https://arxiv.org/abs/2305.01569; weights MIT.

    Args:
        model: A hub id, or a folder in the layout of transformers (default 4 GB).
        processor: The same for tokenizer and image processor, which PickScore has from the model it was tuned from.
        scale: Factor on the score; some code divides by 26.
        grad: Whether r is differentiable in the images.
        dtype: Of the network.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        model: str = MODEL,
        processor: str = PROCESSOR,
        *,
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        check_transformers_clip(model, processor, ("clip",))
        self.model, self.processor = model, processor

    def _load(self) -> TransformersClip:
        return TransformersClip(self.model, self.processor, batch=self.batch, dtype=self.dtype)

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return self.scale * self.clip.scale * self.clip.cosines(images, prompts)
