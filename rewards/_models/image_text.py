"""An image-text model by its name, whichever library's layout it is in: open_clip's or transformers'."""

from __future__ import annotations

from pathlib import Path

from rewards._models.network import Dtype
from rewards._models.open_clip import BUNDLED, FOLDER, OpenClip, check_open_clip
from rewards._models.transformers_clip import TransformersClip, check_transformers_clip
from rewards._models.two_towers import TwoTowers
from rewards._models.weights import HUB

__all__ = ["check_image_text_model", "image_text_model"]


def image_text_model(model: str, weights: str | None, kinds: tuple[str, ...], *, batch: int, dtype: Dtype) -> TwoTowers:
    """The model that `model` names.

    Args:
        model: Of open_clip: "emoji-clip" (bundled), an architecture name, a folder with `open_clip_config.json`, or `hf-hub:ID`.
            Of transformers: OWNER/NAME on the hub, or a folder with `config.json`.
        weights: For an architecture name: a local file, or one of open_clip's tags, which downloads.
        kinds: The `model_type`s of transformers that are right for the caller.
        batch: Images per network call.
        dtype: Of the network.

    Raises:
        FileNotFoundError, ValueError: see `check_image_text_model`; or the weights do not load.
    """
    if _of_open_clip(model, weights):
        return OpenClip(model, weights, batch=batch, dtype=dtype)
    found = TransformersClip(model, batch=batch, dtype=dtype)
    if found.kind not in kinds:  # of a model on the hub it is known only now
        raise ValueError(f"{model!r} is a model of type {found.kind!r}, wanted is one of {kinds}.")
    return found


def check_image_text_model(model: str, weights: str | None, kinds: tuple[str, ...]) -> None:
    """Refuse what cannot be loaded, before anything is; see `check_open_clip` and `check_transformers_clip`."""
    if _of_open_clip(model, weights):
        check_open_clip(model, weights)
    else:
        check_transformers_clip(model, None, kinds)


def _of_open_clip(model: str, weights: str | None) -> bool:
    if weights is not None or model in BUNDLED or model.startswith((HUB, FOLDER)):
        return True
    if Path(model).is_dir():
        return not (Path(model) / "config.json").is_file() or (Path(model) / "open_clip_config.json").is_file()
    if "/" not in model:
        return True
    import open_clip

    return model.replace("/", "-") in open_clip.list_models()  # OpenAI writes ViT-B/32
