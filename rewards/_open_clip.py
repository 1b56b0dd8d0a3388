"""An image-text model of the open_clip library, bundled, on this machine or from the hub, as two maps to unit vectors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.locate import nearest
from rewards import emoji_clip
from rewards._preprocess import Preprocess
from rewards._weights import check_weights

__all__ = ["OpenClip"]

BUNDLED = {"emoji-clip": emoji_clip.path()}
"""Models that come with the package."""

HUB, FOLDER = "hf-hub:", "local-dir:"


class OpenClip:
    """Images and texts -> unit vectors in one space; cosine similarity is their inner product.

    Args:
        model: "emoji-clip", an architecture name of open_clip, a folder with `open_clip_config.json`, or `hf-hub:ID`.
        weights: For an architecture name: a local file, or one of open_clip's tags, which downloads.
        batch: Images per network call.
    """

    def __init__(self, model: str, weights: str | None = None, *, batch: int = 64) -> None:
        self.check(model, weights, batch=batch)
        import open_clip

        self.batch = batch
        folder = _folder(model)
        name = f"{FOLDER}{folder}" if folder else model
        try:
            self.model: Any = open_clip.create_model(name, weights, require_pretrained=True)
        except (RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as error:
            source = "" if folder else f" from {weights or 'the hub'}"
            reason = " ".join(str(error).split())[:400]
            raise ValueError(f"The weights of open_clip model {model!r} do not load{source}: {reason}") from error
        self.model.requires_grad_(False).eval()
        self.preprocess = Preprocess.of_open_clip(self.model.visual.preprocess_cfg)
        self.tokenizer: Any = open_clip.get_tokenizer(name)
        self._device = torch.device("cpu")
        self._texts: dict[str, Tensor] = {}

    @staticmethod
    def check(model: str, weights: str | None = None, *, batch: int = 64) -> None:
        """Refuse what cannot be loaded, before anything is.

        Raises:
            FileNotFoundError: a folder or a file is missing.
            ValueError: no such architecture or tag; weights missing, truncated, or given where the model has its own.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}: at least 1 image per network call.")
        folder = _folder(model)
        if folder or model.startswith(HUB):
            if weights is not None:
                raise ValueError(f"{model!r} has its own weights; leave out `weights`, got {weights!r}.")
            if folder:
                check_weights(_weights_in(folder))
        else:
            _check_architecture(model, weights)

    @property
    def scale(self) -> float:
        """The learned factor between cosine similarities and logits."""
        return float(self.model.logit_scale.exp())

    def images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of images in [0, 1], on their device; differentiable."""
        self._move(images.device)
        vectors = [self.model.encode_image(self.preprocess(x), normalize=True) for x in images.split(self.batch)]
        return torch.cat(vectors).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "batch dim"]:
        """Unit vectors of texts; each text passes through the network once."""
        self._move(device)
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                # One by one: in a batch the last bits would depend on its other texts, hence on a run's interruptions.
                tokens = self.tokenizer([text]).to(device)
                self._texts[text] = self.model.encode_text(tokens, normalize=True)[0].float()
        return torch.stack([self._texts[text] for text in texts])

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


def _folder(model: str) -> Path | None:
    """The folder that `model` names, or None for an architecture or a hub id."""
    if model in BUNDLED:
        return BUNDLED[model]
    if model.startswith(FOLDER):
        return Path(model.removeprefix(FOLDER))
    return Path(model) if Path(model).is_dir() else None


def _weights_in(folder: Path) -> Path:
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no {config}: {folder} is not the folder of an open_clip model.")
    if "model_cfg" not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"{config} has no 'model_cfg': it does not describe an open_clip model.")
    names = [
        f"open_clip_{name}{suffix}"
        for suffix in (".safetensors", ".bin", ".pth")
        for name in ("model", "pytorch_model")
    ]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no weights: it needs {names[0]}.")
    return found


def _check_architecture(model: str, weights: str | None) -> None:
    import open_clip

    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        known = [*BUNDLED, *open_clip.list_models()]
        raise ValueError(
            f"open_clip has no architecture {model!r}.{nearest(name, known)} Use 'emoji-clip', one of open_clip.list_models(), "
            f"a folder with open_clip_config.json, or 'hf-hub:ID'."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        raise ValueError(
            f"Architecture {model!r} needs `weights`: a local file, or one of the tags {tags}, which downloads."
        )
    if weights.lower() not in tags:
        if "." not in weights and "/" not in weights:
            raise ValueError(
                f"{model!r} has no weights {weights!r}.{nearest(weights, tags)} Tags: {tags}; or give a file."
            )
        check_weights(weights)
