"""How surely a classifier sees the wanted class in an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.locate import nearest
from rewards._open_clip import OpenClip
from rewards._preprocess import Preprocess
from rewards._weights import check_weights, load_weights

__all__ = ["Classifier"]

TRAINED = ("torchvision", "timm")


class Classifier:
    r"""r(x) = log p(target | x), nats, with p = softmax(logits / temperature); at most 0.

    With an open_clip model the classes are prompts (zero-shot) and the logits scaled cosine similarities; with
    `torchvision:NAME` or `timm:NAME` they are the outputs of a trained network.

    Args:
        target: The wanted class by name or index; with several, log of their total probability.
        classes: Zero-shot: one prompt per class. Trained network: its classes' names in order; default ImageNet's.
        model: As in `ClipScore`, or `torchvision:resnet18`, `timm:efficientnet_lite0`, ….
        weights: Of a trained network: a local .safetensors or .pth state dict. Of open_clip: as in `ClipScore`.
        temperature: Above 1 flattens, below 1 sharpens p.
        size: Of a trained network: pixels of its square input; default what its published weights expect.
        batch: Images per network call. Memory, not results.
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
    ) -> None:
        settings: dict[str, Any] = {"temperature": temperature, "size": size, "batch": batch}
        self.check(target, classes=classes, model=model, weights=weights, **settings)
        self.temperature, self.batch = temperature, batch
        self.labels = _labels(model, classes)
        self.targets = _targets(target, self.labels)
        self.clip: OpenClip | None = None
        self.network: Any = None
        if _library(model) is None:
            self.clip = OpenClip(model, weights, batch=batch)
        else:
            self.network, self.preprocess = _network(model, len(self.labels), size)
            load_weights(self.network, str(weights), f"{model} with {len(self.labels)} classes")

    @staticmethod
    def check(
        target: int | str | list[int | str],
        *,
        classes: list[str] | None = None,
        model: str = "emoji-clip",
        weights: str | None = None,
        temperature: float = 1.0,
        size: int | None = None,
        batch: int = 64,
    ) -> None:
        """Refuse bad arguments without loading anything; FileNotFoundError or ValueError."""
        for name, value in (("temperature", temperature), ("size", size), ("batch", batch)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be positive.")
        if _library(model) is None:
            if size is not None:
                raise ValueError(
                    f"size is {size}: it is for torchvision and timm; {model!r} brings its own preprocessing."
                )
            OpenClip.check(model, weights, batch=batch)
        elif weights is None:
            raise ValueError(f"{model!r} needs `weights`: the path of a .safetensors or .pth state dict.")
        _targets(target, _labels(model, classes))
        if _library(model) is not None:
            check_weights(str(weights))

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        return self.log_probs(images)[:, self.targets].logsumexp(1).clamp(max=0)  # rounding may put it a hair above

    @torch.no_grad()
    def log_probs(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """log p(class | image) of every class, nats."""
        if self.clip is not None:
            return self.clip.log_probs(images, self.labels, temperature=self.temperature)
        self.network.to(images.device)
        logits = torch.cat([self.network(self.preprocess(x)) for x in images.split(self.batch)])
        return (logits.float() / self.temperature).log_softmax(1)

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
        return self.log_probs(images)[:, found].log_softmax(1)


def _library(model: str) -> str | None:
    """torchvision or timm, or None for a model of open_clip."""
    head = model.partition(":")[0]
    return head if head in TRAINED else None


def _labels(model: str, classes: list[str] | None) -> list[str]:
    """The classes' names; checks that a trained network's architecture exists."""
    library, name = _library(model), model.partition(":")[2]
    if library is not None:
        known = _architectures(library)
        if name not in known:
            raise ValueError(
                f"{library} has no classifier {name!r}.{nearest(name, known)} See {library}'s list_models()."
            )
    if classes is not None:
        double = next((label for label in classes if classes.count(label) > 1), None)
        if len(classes) < 2 or double is not None:
            raise ValueError(f"classes is {classes}: it needs at least two different entries.")
        return classes
    if library == "torchvision":
        from torchvision.models import get_model_weights

        return list(get_model_weights(name).DEFAULT.meta["categories"])
    if library == "timm":
        import timm

        config: Any = timm.get_pretrained_cfg(name)
        return [str(i) for i in range(config.num_classes)]
    raise ValueError(f"{model!r} classifies by prompts: give `classes`, one prompt per class.")


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


def _architectures(library: str) -> list[str]:
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _network(model: str, classes: int, size: int | None) -> tuple[Any, Preprocess]:
    """An untrained network with its preprocessing."""
    library, _, name = model.partition(":")
    if library == "timm":
        import timm
        import timm.data.config

        network: Any = timm.create_model(name, pretrained=False, num_classes=classes)
        preprocess = Preprocess.of_timm(timm.data.config.resolve_model_data_config(network))
    else:
        import torchvision

        network = torchvision.models.get_model(name, weights=None, num_classes=classes)
        preprocess = Preprocess.of_torchvision(torchvision.models.get_model_weights(name).DEFAULT.transforms())
    if size is not None:
        preprocess = preprocess.resized(size)
    return network.requires_grad_(False).eval(), preprocess
