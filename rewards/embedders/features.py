"""What an image network sees in an image: a space to measure distances in, for `eval.embedder`; no reward."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.files.completeness import check_finite
from rewards._models.image_text import check_image_text_model, image_text_model
from rewards._models.network import DTYPES, Dtype
from rewards._models.trained import (
    Network,
    bundled,
    check_architecture,
    check_file,
    labels,
    library_of,
    load_network,
    without_last_layer,
)
from rewards._models.two_towers import TwoTowers

__all__ = ["Features"]

KINDS = ("clip",)


class Features(TwoPhase):
    """The vector that goes into a trained network's last layer, or the image vector of an image-text model; not normalised.

    Args:
        model: `timm:NAME`, `torchvision:NAME`, the bundled `fashion-classifier`, or an image-text model as in `ClipScore`.
        weights: Of a trained network: a local .safetensors or .pth state dict, `hf-hub:OWNER/NAME/FILE`, or
            `package:MODULE/FILE` for one inside an installed package. Of an image-text model: as in `ClipScore`.
        classes: Of a trained network: outputs of its last layer in the weights, 0 where they have none; default: that of the
            published ones.
        size: Of a trained network: pixels of its square input; default what its published weights expect.
        batch: Images per network call. Memory, not results.
        dtype: Of the network; the vectors are float32.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or its weights are missing.
    """

    def __init__(
        self,
        model: str = "emoji-clip",
        weights: str | None = None,
        *,
        classes: int | None = None,
        size: int | None = None,
        batch: int = 64,
        dtype: Dtype = "float32",
    ) -> None:
        for name, value, least in (("classes", classes, 0), ("size", size, 1), ("batch", batch, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: use one of {DTYPES}.")
        found = bundled(Network(model, weights, classes, size))
        model, weights, size = found.model, found.weights, found.size
        classes = len(found.classes) if isinstance(found.classes, list) else found.classes
        self.trained = library_of(model) is not None
        if self.trained:
            check_architecture(model)
            check_file(weights, model)
        elif size is not None or classes is not None:
            raise ValueError(f"size and classes are for torchvision and timm; {model!r} brings its own preprocessing.")
        else:
            check_image_text_model(model, weights, KINDS)
        self.model, self.weights, self.classes, self.size = model, weights, classes, size
        self.batch, self.dtype, self._precision = batch, dtype, getattr(torch, dtype)

    @cached_property
    def _clip(self) -> TwoTowers:
        return image_text_model(self.model, self.weights, KINDS, batch=self.batch, dtype=self.dtype)

    @cached_property
    def _trained(self) -> tuple[Any, Any]:
        """The network, loaded, and how images are prepared for it."""
        classes = len(labels(self.model)) if self.classes is None else self.classes
        network, preprocess = load_network(self.model, str(self.weights), classes, self.size)
        check_finite(network.to(self._precision), str(self.weights))
        return without_last_layer(network, self.model), preprocess

    def load_weights(self) -> None:
        _ = self._trained if self.trained else self._clip

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """A vector of each image in [0, 1], on its device."""
        if not self.trained:
            return self._clip.vectors(images)
        network, preprocess = self._trained
        network.to(images.device)
        return torch.cat([network(preprocess(x).to(self._precision)).float() for x in images.split(self.batch)])
