"""Find a diffusers folder, and settle the pipeline that was loaded from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.files.completeness import check_finite, read_json
from pipelines._models.random_weights import is_random, random_folder

__all__ = ["BUNDLED", "is_hub_id", "left_out", "local_folder", "settled"]

BUNDLED = {
    "emoji": "pipelines/emoji/weights",
    "emoji_flow": "pipelines/emoji/flow",
    "fashion": "pipelines/fashion/weights",
}
"""Priors that come with this package: short name -> folder in the repository."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(path: str) -> bool:
    """True for "organisation/name" that is not a folder here."""
    return not Path(path).exists() and _HUB_ID.fullmatch(path) is not None


def local_folder(
    path: str, pipeline: type, without: Sequence[str] = (), variant: str | None = None, revision: str | None = None
) -> Path:
    """The folder behind a bundled name, a path or a hub id; a hub id is downloaded first.

    Args:
        path: One of `BUNDLED`, "random:NAME", a folder, or "organisation/name" on the model hub.
        pipeline: diffusers class that knows which files of a hub repository it needs.
        without: Parts of it that are not wanted.
        variant: Of the weight files of a hub repository; None takes the plain ones, or else "fp16".
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: there is no such folder and `path` does not look like a hub id.
        OSError: the hub cannot be reached, or has no such model.
    """
    if is_random(path):
        return random_folder(path)
    if path in BUNDLED:
        return Path(__file__).parents[2] / BUNDLED[path]
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise ValueError(
            f"No model at path={path!r}: it is not a folder, not a bundled prior ({', '.join(BUNDLED)}) and not a hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'. Give the folder that holds model_index.json."
        )
    return _download(path, pipeline, without, variant, revision)


def _download(path: str, pipeline: Any, without: Sequence[str], variant: str | None, revision: str | None) -> Path:
    options = dict.fromkeys(without) | {"use_safetensors": True, "revision": revision}
    for candidate in dict.fromkeys((variant, variant or "fp16")):
        try:
            return Path(pipeline.download(path, variant=candidate, **options))
        except (OSError, ValueError) as error:
            # diffusers says so of a repository with no plain safetensors files, and of one without this variant
            lacking = "safetensors" in str(error) or "variant" in str(error)
            reason = " ".join(str(error).split())[:300]
            if not lacking:
                message = (
                    f"path={path!r} could not be fetched from the model hub ({reason}). Give a local folder instead."
                )
                raise OSError(message) from error
    asked = f"no {variant!r} variant" if variant else "neither plain nor fp16 weights"
    raise OSError(
        f"path={path!r} on the model hub has {asked} in safetensors (*.bin files are pickles and never read). Load it where you "
        "trust it, pipe.save_pretrained(FOLDER) writes safetensors, and give that folder."
    )


def settled(pipe: Any, components: Sequence[str], where: Path, *, dtype: torch.dtype, device: torch.device) -> str:
    """Freeze a pipeline that has been loaded and put it where it runs, quiet; a digest that tells its weights from another model's.

    Args:
        pipe: The pipeline.
        components: Its networks.
        where: It was loaded from, for messages.
        dtype: Of the networks.
        device: Where to.

    Raises:
        ValueError: a weight is not finite.
    """
    components = [name for name in components if getattr(pipe, name, None) is not None]
    for name in components:
        check_finite(getattr(pipe, name), where / name)
    digest = _digest(pipe, components)
    pipe.to(device)
    for network in (getattr(pipe, name) for name in components):
        network.requires_grad_(False).eval()
        if network.dtype != dtype:  # diffusers versions that call the argument torch_dtype ignore dtype
            network.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return digest


def left_out(folder: Path, pipeline: Any) -> list[str]:
    """Parts that a folder names without a class although its pipeline needs them: `from_pretrained` takes None for them.

    Stable Diffusion 3 without T5 is such a folder; diffusers saves it and refuses to load it unless told again.
    """
    index = read_json(folder / "model_index.json")
    return [
        name for name, value in index.items() if value == [None, None] and name not in pipeline._optional_components
    ]


def _digest(pipe: Any, components: Sequence[str]) -> str:
    """Names, shapes and first values of all weights: enough to tell two models apart without reading gigabytes."""
    found = hashlib.blake2b(digest_size=16)
    for component in components:
        for name, value in sorted(getattr(pipe, component).state_dict().items()):
            found.update(f"{component}.{name}{tuple(value.shape)}".encode())
            found.update(value.flatten()[:32].float().numpy().tobytes())
    return found.hexdigest()
