"""Reward models of a few MB with random weights, in the file formats of the real ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

CLASSES = ["a cat emoji", "a dog emoji", "a blue thing"]


@lru_cache
def tiny_clip() -> Path:
    """The folder of an open_clip model whose similarities differ visibly between images and between texts."""
    folder = Path(mkdtemp(prefix="tiny-clip-"))
    config = {"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.4] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = open_clip.model.CLIP(**MODEL)
        with torch.no_grad():
            model.token_embedding.weight.mul_(30)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def some_images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Smooth random images whose values are those of 8-bit files, so that PIL sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (images * 255).round() / 255
