"""The tiny pipeline as an architecture: its folder without a single weight, vocabulary or text encoder's file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.oracles.tiny import WIDTH, save_tiny

__all__ = ["save_architecture"]

CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")


def save_architecture(folder: Path) -> Path:
    """Write it and return the folder; `random:FOLDER` is then a prior."""
    save_tiny(folder)
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in CONFIGS:
            file.unlink()
    shapes = {"prompt_embeds": [77, WIDTH], "negative_prompt_embeds": [77, WIDTH]}
    (folder / "embeddings.json").write_text(json.dumps(shapes))
    return folder
