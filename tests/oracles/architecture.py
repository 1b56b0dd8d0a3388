"""A tiny pipeline as an architecture: its folder without a single weight, vocabulary or text encoder's file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.oracles.tiny import tiny_stable_diffusion

__all__ = ["save_architecture"]

CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
NAMES = ("prompt_embeds", "negative_prompt_embeds")


def save_architecture(folder: Path, pipe: Any = None, names: Sequence[str] = NAMES) -> Path:
    """Write it and return the folder; `random:FOLDER` is then a prior.

    Args:
        folder: Where to.
        pipe: With text encoders; by default the tiny Stable Diffusion.
        names: What its `encode_prompt` answers.
    """
    pipe = tiny_stable_diffusion() if pipe is None else pipe
    with torch.no_grad():
        answers = pipe.encode_prompt(prompt="a", **_options(pipe))
    shapes = {
        name: list(value.shape if name.endswith("_ids") else value.shape[1:])
        for name, value in zip(names, answers, strict=True)
    }
    pipe.save_pretrained(folder)
    for file in sorted(folder.rglob("*"), reverse=True):
        if file.is_dir() and not any(file.iterdir()):
            file.rmdir()
        elif file.is_file() and file.name not in CONFIGS:
            file.unlink()
    (folder / "embeddings.json").write_text(json.dumps(shapes))
    return folder


def _options(pipe: Any) -> dict[str, Any]:
    """What `encode_prompt` insists on, in each family."""
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": "b"}
    given |= {"prompt_2": None, "prompt_3": None}
    taken = inspect.signature(pipe.encode_prompt).parameters
    return {name: value for name, value in given.items() if name in taken}
