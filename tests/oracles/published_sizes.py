"""Diffusers folders of published sizes whose weight files are sparse: headers, and zeros that take no disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.oracles.tiny import save_tiny

NAMES = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE = {
    "sample_size": 512, "latent_channels": 4, "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file of zeros: its header is written, the rest is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def save_stable_diffusion_15(folder: Path, widen: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """A folder of the size of Stable Diffusion 1.5 without its numbers; returns the networks, without memory.

    Args:
        folder: Where to.
        widen: Multiplies the UNet's channels.
        dtype: That the files say.
    """
    save_tiny(folder)
    unet_config = UNET | {"block_out_channels": tuple(widen * n for n in (320, 640, 1280, 1280))}
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**unet_config),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        }
    for name, network in networks.items():
        model: Any = network
        (file,) = (folder / name).glob("*.safetensors")
        model.config.save_pretrained(folder / name) if name == "text_encoder" else model.save_config(folder / name)
        saved = {key: tuple(value.shape) for key, value in model.state_dict().items() if "position_ids" not in key}
        write_sparse(file, saved, dtype)
    return networks
