"""How surely a classifier sees the wanted class in an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import check_finite
from rewards._models.image_text import check_image_text_model, image_text_model
from rewards._models.network import Dtype, NetworkReward
from rewards._models.trained import Network, bundled, check_architecture, check_file, labels, library_of, load_network
from rewards._models.two_towers import TwoTowers

__all__ = ["Classifier"]

KINDS = ("clip",)


class Classifier(NetworkReward):
    r"""r(x) = log p(target | x), nats, with p = softmax(logits / temperature); at most 0.

    With an image-text model the classes are prompts (zero-shot) and the logits scaled cosine similarities; with
    `torchvision:NAME`, `timm:NAME` or `fashion-classifier` they are the outputs of a trained network.

    Args:
        target: The wanted class by name or index; with several, log of their total probability.
        classes: Zero-shot: one prompt per class. Trained network: its classes' names in order; default ImageNet's.
        model: As in `ClipScore`, or `torchvision:resnet18`, `timm:tf_efficientnet_lite0`, …, or the bundled `fashion-classifier`,
            which brings its own weights, classes and size.
        weights: Of a trained network: a local .safetensors or .pth state dict, `hf-hub:OWNER/NAME/FILE`, or
            `package:MODULE/FILE` for one inside an installed package. Of an image-text model: as in `ClipScore`.
        temperature: Above 1 flattens, below 1 sharpens p.
        size: Of a trained network: pixels of its square input; default what its published weights expect.
        batch: Images per network call. Memory, not results.
        dtype: Of the network.
        grad: Whether r is differentiable in the images.
    """

    def __init__(
        self,
        target: int | str | list[int | str],
        *,
        classes: list[str] | None = None,
        model: str = "emoji-clip",
        weights: str | None = None,
        temperature: float = 1.0,
        size: int | None = None,
        batch: int = 64,
        dtype: Dtype = "float32",
        grad: bool = False,
    ) -> None:
        for name, value in (("temperature", temperature), ("size", size), ("batch", batch)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be positive.")
        super().__init__(batch=batch, dtype=dtype, grad=grad)
        found = bundled(Network(model, weights, classes, size))
        model, weights, size = found.model, found.weights, found.size
        classes = found.classes if isinstance(found.classes, list) else None
        self.trained = library_of(model) is not None
        if self.trained:
            check_architecture(model)
        elif size is not None:
            raise ValueError(f"size is {size}: it is for torchvision and timm; {model!r} brings its own preprocessing.")
        else:
            check_image_text_model(model, weights, KINDS)
        self.labels = _labels(model, classes)
        self.targets = _targets(target, self.labels)
        if self.trained:
            check_file(weights, model)
        self.model, self.weights, self.size, self.temperature = model, weights, size, temperature

    @cached_property
    def clip(self) -> TwoTowers | None:
        """The image-text model, loaded; None where a trained network classifies."""
        if self.trained:
            return None
        return image_text_model(self.model, self.weights, KINDS, batch=self.batch, dtype=self.dtype)

    @cached_property
    def _trained(self) -> tuple[Any, Any]:
        """The trained network, loaded, and how images are prepared for it."""
        network, preprocess = load_network(self.model, str(self.weights), len(self.labels), self.size)
        check_finite(network.to(self.precision), str(self.weights))
        return network, preprocess

    @property
    def network(self) -> Any:
        """The trained network; None where an image-text model classifies."""
        return self._trained[0] if self.trained else None

    def load_weights(self) -> None:
        _ = self._trained if self.trained else self.clip

    def forward(self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return self._log_probs(images)[:, self.targets].logsumexp(1).clamp(max=0)  # rounding may put it a hair above

    @torch.no_grad()
    def log_probs(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """log p(class | image) of every class, nats."""
        return self._log_probs(images)

    @torch.no_grad()
    def classify(
        self, images: Float[Tensor, "batch 3 height width"], classes: Sequence[str]
    ) -> Float[Tensor, "batch classes"]:
        """log p(class | image), nats, among other classes than the reward's own: zero-shot for any prompts.

        Raises:
            ValueError: a trained network knows only its own classes.
        """
        if self.clip is not None:
            return self.clip.log_probs(images, classes, temperature=self.temperature)
        found = _targets(list(classes), self.labels)
        return self._log_probs(images)[:, found].log_softmax(1)

    def _log_probs(self, images: Tensor) -> Tensor:
        if self.clip is not None:
            return self.clip.log_probs(images, self.labels, temperature=self.temperature)
        network, preprocess = self._trained
        network.to(images.device)
        logits = torch.cat([network(preprocess(x).to(self.precision)) for x in images.split(self.batch)])
        return (logits.float() / self.temperature).log_softmax(1)


def _labels(model: str, classes: list[str] | None) -> list[str]:
    """The classes' names."""
    if classes is not None:
        double = next((label for label in classes if classes.count(label) > 1), None)
        if len(classes) < 2 or double is not None:
            raise ValueError(f"classes is {classes}: it needs at least two different entries.")
        return classes
    if library_of(model) is None:
        raise ValueError(f"{model!r} classifies by prompts: give `classes`, one prompt per class.")
    return labels(model)


def _targets(target: int | str | Sequence[int | str], labels: Sequence[str]) -> list[int]:
    """Indices of the wanted classes."""
    wanted = [target] if isinstance(target, int | str) else list(target)
    if not wanted:
        raise ValueError("target is empty: name at least one class.")
    for item in wanted:
        if isinstance(item, int) and not 0 <= item < len(labels):
            raise ValueError(
                f"target is {item}: there are {len(labels)} classes, so it must be in [0, {len(labels) - 1}]."
            )
        if isinstance(item, str) and item not in labels:
            shown = ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
            raise ValueError(f"target {item!r} is not among the classes.{nearest(item, labels)} Classes: {shown}.")
    return list(dict.fromkeys(item if isinstance(item, int) else labels.index(item) for item in wanted))
