"""Write a trained pipeline as the folder that is bundled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusion_rtb.files.whole import write_json

__all__ = ["export_prior"]


def export_prior(pipe: DiffusionPipeline, folder: Path, *, licences: Path) -> None:
    """Save the pipeline in half precision; `folder` is replaced only when the new one is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    pipe.save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("text_encoder*/config.json"):
        _default_to_single_precision(config)
    for config in partial.glob("*/config.json"):
        _forget_where_it_was(config)
    for file in partial.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    for file in licences.glob("LICENSE-*"):
        shutil.copy(file, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _default_to_single_precision(config: Path) -> None:
    """Transformers loads weights in the type their configuration names; diffusers loads in float32 unless told otherwise."""
    values = json.loads(config.read_text())
    write_json(config, values | {"dtype": "float32"}, indent=2)


def _forget_where_it_was(config: Path) -> None:
    """diffusers writes down which folder a network was read from, which is nobody else's."""
    values = json.loads(config.read_text())
    if values.pop("_name_or_path", None) is not None:
        write_json(config, values, indent=2)
