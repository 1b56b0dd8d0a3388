"""How much people like an image, whatever its prompt: LAION's aesthetic predictor, version 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rewards._models.linear_head import FirstHead, LinearHead, aesthetic_head
from rewards._models.network import Dtype
from rewards._models.open_clip import OpenClip
from rewards._models.two_towers import ImageTextReward
from rewards._models.weights import check_weights, fetch, fill, read_weights

__all__ = ["Aesthetic"]

HEAD = "hf-hub:camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"

ARCHITECTURES = {name: f"{name}-quickgelu" for name in ("ViT-L-14", "ViT-B-16", "ViT-B-32")}
"""OpenAI's, for each of which LAION trained a head: with the plain GELU of "ViT-L-14" its weights give other embeddings."""


class Aesthetic(ImageTextReward):
    r"""r(x) = head(e_image(x)), a rating: 1 to 10 in its data, most images 4 to 7; the prompt plays no part.

    e_image is the unit embedding of OpenAI's CLIP ViT-L/14, head five linear layers trained on ratings of the SAC, LAION logos
    and AVA data sets. The aesthetic reward of Black et al., 2023, https://arxiv.org/abs/2305.13301. LAION's first predictor, one
    linear layer on the same embedding (`sa_0_4_vit_l_14_linear.pth`), is read as well; its variant with ReLU is not.

    Schuhmann, "improved-aesthetic-predictor", 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor;
    weights Apache-2.0.

    Args:
        weights: The head, `sac+logos+ava1-l14-linearMSE.pth`: a local path or `hf-hub:OWNER/NAME/FILE` (default, 4 MB).
        clip: "openai" downloads CLIP's weights through open_clip; or a file in OpenAI's or open_clip's layout, given alike:
            OpenAI's own `ViT-L-14.pt`, of which only the tensors are read, or a state dict.
        architecture: CLIP's, for heads of other sizes: "ViT-L-14", "ViT-B-16" or "ViT-B-32".
        grad: Whether r is differentiable in the images.
        dtype: Of CLIP; the head is float32.
        batch: Images per network call. Memory, not results.
    """

    def __init__(
        self,
        weights: str = HEAD,
        clip: str = "openai",
        *,
        architecture: Literal["ViT-L-14", "ViT-B-16", "ViT-B-32"] = "ViT-L-14",
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {architecture!r}: use one of {tuple(ARCHITECTURES)}.")
        super().__init__(batch=batch, dtype=dtype, grad=grad)
        check_weights(weights)
        if clip != "openai":
            check_weights(clip)
        self.weights, self._clip, self.architecture = weights, clip, architecture

    @cached_property
    def head(self) -> LinearHead | FirstHead:
        """What makes a rating of an embedding, loaded."""
        path = fetch(self.weights)
        state = read_weights(path)
        head = aesthetic_head(state, path).requires_grad_(False)
        fill(head, state, path, "an aesthetic head")
        return head

    def _load(self) -> OpenClip:
        """ValueError where the head was trained on another CLIP."""
        name, head = ARCHITECTURES[self.architecture], self.head
        found = (
            OpenClip(name, self._clip, batch=self.batch, dtype=self.dtype)
            if self._clip == "openai"
            else OpenClip.of_file(name, self._clip, "shortest", batch=self.batch, dtype=self.dtype)
        )
        self._check_fit(found, head)
        return found

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        self.head.to(images.device)
        return self.head(self.clip.images(images))

    def _check_fit(self, clip: OpenClip, head: LinearHead | FirstHead) -> None:
        found, wanted = clip.model.visual.output_dim, head.width
        if found != wanted:
            raise ValueError(
                f"CLIP ({self._clip}) embeds images in {found} dimensions, the head in {self.weights} expects {wanted}: it was "
                "trained on another CLIP. Heads of 768 are for architecture ViT-L-14, heads of 512 for ViT-B-16 or ViT-B-32."
            )
