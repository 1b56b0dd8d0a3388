"""Find a diffusers folder, prove that it is complete before any of its weights is loaded, and load it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["BUNDLED", "check_folder", "is_hub_id", "load_pipeline", "local_folder"]

BUNDLED = {"emoji": "pipelines/emoji/weights"}
"""Priors that come with this package: short name -> folder in the repository."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(path: str) -> bool:
    """True for "organisation/name" that is not a folder here."""
    return not Path(path).exists() and _HUB_ID.fullmatch(path) is not None


def local_folder(path: str, pipeline: type) -> Path:
    """The folder behind a bundled name, a path or a hub id; a hub id is downloaded first.

    Args:
        path: "emoji", a folder, or "organisation/name" on the model hub.
        pipeline: diffusers class that knows which files of a hub repository it needs.

    Raises:
        ValueError: there is no such folder and `path` does not look like a hub id.
        OSError: the hub cannot be reached, or has no such model.
    """
    if path in BUNDLED:
        return Path(__file__).parents[1] / BUNDLED[path]
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise ValueError(
            f"No model at path={path!r}: it is not a folder, not a bundled prior ({', '.join(BUNDLED)}) and not a hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'. Give the folder that holds model_index.json."
        )
    try:
        return Path(pipeline.download(path, safety_checker=None, use_safetensors=True))  # type: ignore[attr-defined]
    except OSError as error:
        raise OSError(
            f"path={path!r} could not be fetched from the model hub ({error}). Give a local folder instead."
        ) from error


def check_folder(folder: Path, pipeline: str, components: Sequence[str]) -> str | None:
    """Check that a diffusers folder holds this kind of pipeline and that its weight files are whole; cheap.

    Args:
        folder: Holds model_index.json and one sub-folder per component.
        pipeline: Class name that model_index.json must name.
        components: Sub-folders that must hold weights.

    Returns:
        The variant to ask diffusers for: "fp16" when only such files are there, else None.

    Raises:
        ValueError: something is missing, truncated, or of another kind.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} holds no model_index.json: it is not a diffusers pipeline folder (pipe.save_pretrained writes one)."
        )
    found = json.loads(index.read_text()).get("_class_name")
    if found != pipeline:
        raise ValueError(
            f"{folder} holds a {found}; this prior needs a {pipeline}. Choose another `component` for it, or another `path`."
        )
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"{folder} holds no scheduler/scheduler_config.json, which has the model's noise schedule.")
    variants = {_check_component(folder / name) for name in components}
    return "fp16" if "fp16" in variants else None


def _check_component(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"No weights in {folder}: a *.safetensors file is needed there (*.bin files are pickles and never read; "
            "pipe.save_pretrained writes safetensors)."
        )
    for file in weights:
        try:
            # Reads the header and compares the file's length with it, but loads no tensor.
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): copy or download it again.") from error
    return "fp16" if all(".fp16" in file.name for file in weights) else None


def load_pipeline(
    pipeline: Any, folder: Path, components: Sequence[str], *, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[Any, str]:
    """Load a diffusers pipeline with all networks frozen, in evaluation mode, and quiet.

    Returns:
        The pipeline, and a digest that tells its weights from another model's.
    """
    with _quiet():
        pipe = pipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
    digest = _digest(pipe, components)
    pipe.to(device)
    for network in (getattr(pipe, name) for name in components):
        network.requires_grad_(False).eval()
        if network.dtype != dtype:  # diffusers versions that call the argument torch_dtype ignore dtype
            network.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, digest


def _digest(pipe: Any, components: Sequence[str]) -> str:
    """Names, shapes and first values of all weights: enough to tell two models apart without reading gigabytes."""
    found = hashlib.blake2b(digest_size=16)
    for component in components:
        for name, value in sorted(getattr(pipe, component).state_dict().items()):
            found.update(f"{component}.{name}{tuple(value.shape)}".encode())
            found.update(value.flatten()[:32].float().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for loading: they would run into those of the run."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    shown = [library for library in (ours, theirs) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
