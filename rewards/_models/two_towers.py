"""A model with one network for images and one for texts, as two maps to unit vectors of one space."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_rtb.files.completeness import check_finite
from diffusion_rtb.versions import version
from rewards._models.network import Dtype, NetworkReward

__all__ = ["ImageTextReward", "TwoTowers"]

REMEMBERED = 10_000
"""Texts whose vectors are kept; the oldest go first."""


class TwoTowers(ABC):
    """Images and texts -> unit vectors, float32; cosine similarity is their inner product.

    Args:
        model: The network, with a `logit_scale` and perhaps a `logit_bias`.
        name: Where it is from, for messages.
        batch: Images per network call.
        dtype: Of the network; the vectors are normalised in float32.
    """

    preprocess: Any
    tokenizer: Any

    def __init__(self, model: Any, name: str, *, batch: int, dtype: Dtype) -> None:
        self.model = model.requires_grad_(False).eval().to(getattr(torch, dtype))
        check_finite(self.model, name)
        self.batch, self.dtype = batch, getattr(torch, dtype)
        self._device = torch.device("cpu")
        self._texts: dict[str, Tensor] = {}
        self._seen: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    @abstractmethod
    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The image network's output for images in [0, 1]; differentiable."""

    @abstractmethod
    def embed_text(self, text: str) -> Float[Tensor, "1 dim"]:
        """The text network's output."""

    @property
    def scale(self) -> float:
        """The learned factor between cosine similarities and logits."""
        return float(self.model.logit_scale.float().exp())

    @property
    def bias(self) -> float:
        """The learned constant in logits: of SigLIP; 0 where there is none."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias)

    def images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of images in [0, 1], on their device; differentiable."""
        return normalize(self.vectors(images), dim=-1)

    def vectors(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The same before they are normalised, float32; of one tensor once, however often it is asked about, as by each factor."""
        followed, now = torch.is_grad_enabled() and images.requires_grad, version(images)
        if self._seen is not None and not followed:
            before, then, vectors = self._seen
            if before() is images and then == now:
                return vectors
        self._move(images.device)
        found = torch.cat([self.embed_images(x).float() for x in images.split(self.batch)])
        self._seen = None if followed or now is None else (weakref.ref(images), now, found)
        return found

    @torch.no_grad()
    def texts(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "batch dim"]:
        """Unit vectors of texts; each text passes through the network once."""
        self._move(device)
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                # One by one: in a batch the last bits would depend on its other texts, hence on a run's interruptions.
                self._texts[text] = normalize(self.embed_text(text).float(), dim=-1)[0]
        vectors = torch.stack([self._texts[text] for text in texts])
        for text in list(self._texts)[: max(len(self._texts) - REMEMBERED, 0)]:
            del self._texts[text]
        return vectors

    def cosines(self, images: Float[Tensor, "batch 3 height width"], texts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Of each image with its own text, in [-1, 1]."""
        return (self.images(images) * self.texts(texts, images.device)).sum(1)

    def log_probs(
        self, images: Float[Tensor, "batch 3 height width"], classes: Sequence[str], *, temperature: float = 1.0
    ) -> Float[Tensor, "batch classes"]:
        r"""Zero-shot log p(class | image) = log softmax_c(scale·<image, class_c> / temperature), in nats."""
        cosines = self.images(images) @ self.texts(classes, images.device).T
        return (cosines * (self.scale / temperature)).log_softmax(1)

    def _move(self, device: torch.device) -> None:
        if device != self._device:
            self.model.to(device)
            self._texts = {text: vector.to(device) for text, vector in self._texts.items()}
            self._device = device


class ImageTextReward(NetworkReward):
    """One by an image-text model, which is loaded on first use, or by `load_weights`."""

    @abstractmethod
    def _load(self) -> TwoTowers:
        """The model."""

    @cached_property
    def clip(self) -> TwoTowers:
        """The image-text model, loaded."""
        return self._load()

    def load_weights(self) -> None:
        _ = self.clip
