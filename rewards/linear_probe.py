"""A linear probe: one layer on the image vectors of an image-text model, as ratings and preferences are often fitted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rewards import emoji_taste
from rewards._models.image_text import check_image_text_model, image_text_model
from rewards._models.linear_head import FirstHead, aesthetic_head
from rewards._models.network import Dtype
from rewards._models.two_towers import ImageTextReward, TwoTowers
from rewards._models.weights import check_weights, fetch, fill, read_weights

__all__ = ["LinearProbe"]

BUNDLED = {"emoji-taste": emoji_taste.path() / "head.safetensors"}
KINDS = ("clip", "siglip", "siglip2")


class LinearProbe(ImageTextReward):
    r"""r(x) = scale · (<w, e_image(x)> + b), e_image the unit vector of an image-text model; the prompt plays no part.

    Fitted to pairs that somebody compared, r_i − r_j are the log-odds that i is preferred to j: Bradley and Terry, 1952,
    https://doi.org/10.2307/2334029. The bundled `emoji-taste` was fitted to a stated rule, for pictures that are symmetric and
    colourful.

    Args:
        head: "emoji-taste"; or a file with `weight` (1, width) and `bias` (1,), e.g. the state dict of an `nn.Linear`, or
            `hf-hub:OWNER/NAME/FILE`.
        model: The one that the head was fitted on, as in `ClipScore`.
        weights: Of the model, as in `ClipScore`.
        scale: Factor on r; not 0.
        grad: Whether r is differentiable in the images.
        dtype: Of the model; the head is float32.
        batch: Images per network call. Memory, not results.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or no linear layer with one output.
    """

    def __init__(
        self,
        head: str = "emoji-taste",
        *,
        model: str = "emoji-clip",
        weights: str | None = None,
        scale: float = 1.0,
        grad: bool = False,
        dtype: Dtype = "float32",
        batch: int = 64,
    ) -> None:
        super().__init__(batch=batch, dtype=dtype, grad=grad, scale=scale)
        self._file = str(BUNDLED.get(head, head))
        check_weights(self._file)
        check_image_text_model(model, weights, KINDS)
        self._head, self.model, self.weights = head, model, weights

    @cached_property
    def head(self) -> FirstHead:
        """The linear layer, loaded."""
        path = fetch(self._file)
        state = read_weights(path)
        head = aesthetic_head(state, path).requires_grad_(False)
        if not isinstance(head, FirstHead):
            raise ValueError(f"{path} is a head of several layers, of the reward `aesthetic`; a linear probe has one.")
        fill(head, state, path, "a linear probe")
        return head

    def _load(self) -> TwoTowers:
        """ValueError where the head was fitted on another model."""
        found = image_text_model(self.model, self.weights, KINDS, batch=self.batch, dtype=self.dtype)
        width = found.texts(["-"], torch.device("cpu")).shape[1]
        if width != self.head.width:
            raise ValueError(
                f"{self.model!r} embeds images in {width} dimensions, the head {self._head!r} expects {self.head.width}: it was "
                "fitted on another model; name that one in `model`."
            )
        return found

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return self.scale * self.head.to(images.device)(self.clip.images(images))
