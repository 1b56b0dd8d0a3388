"""Human Preference Score v2 and v2.1: a CLIP ViT-H/14 tuned on what people chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rewards._models.network import Dtype
from rewards._models.open_clip import OpenClip
from rewards._models.two_towers import ImageTextReward
from rewards._models.weights import check_weights

__all__ = ["HpsV2"]

PUBLISHED = {
    "v2.0": "hf-hub:xswu/HPSv2/HPS_v2_compressed.pt",
    "v2.1": "hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt",
}


class HpsV2(ImageTextReward):
    r"""r(x) = scale · <e_image(x), e_text(prompt)>, the preference score in [-scale, scale]; real images lie near 0.2 to 0.35.

    As published, an image is resized until its longer side is the network's (224 pixels) and padded with black to a square: a
    wide image is not cropped. The published code resizes floats and leaves antialiasing to torchvision, which has had it since
    0.17: with that or a newer one its scores are these, with an older one it gives other numbers. Scores are often printed
    times 100 (`scale`).

    Wu et al., "Human Preference Score v2", 2023, https://arxiv.org/abs/2306.09341; weights Apache-2.0.

    Args:
        version: "v2.1" or "v2.0"; the two are not on one scale.
        weights: The published file: a local path or `hf-hub:OWNER/NAME/FILE`; default: the version's at xswu/HPSv2 (2 GB).
        scale: Factor on the score.
        grad: Whether r is differentiable in the images.
        dtype: Of the network; the published code runs it under autocast.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        version: Literal["v2.0", "v2.1"] = "v2.1",
        weights: str | None = None,
        *,
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        if version not in PUBLISHED:
            raise ValueError(f"version is {version!r}: use one of {tuple(PUBLISHED)}.")
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        self.weights = weights or PUBLISHED[version]
        check_weights(self.weights)

    def _load(self) -> OpenClip:
        return OpenClip.of_file("ViT-H-14", self.weights, "fit", batch=self.batch, dtype=self.dtype)

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return self.scale * self.clip.cosines(images, prompts)
