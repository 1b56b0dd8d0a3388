"""A Stable Diffusion pipeline under the names of its first implementation, walked from the structure of its networks.

Such a file is what people share. diffusers reads it by rules of its own; these go the other way and know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Names = Iterator[tuple[str, str]]
"""diffusers' module -> ldm's module."""

RESIDUAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESIDUAL |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def unet_names(unet: Any) -> Names:
    yield from {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}.items()
    for kind, ldm in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        yield from ((f"{kind}.linear_1", f"{ldm}.0"), (f"{kind}.linear_2", f"{ldm}.2"))
    place = 1
    for level, block in enumerate(unet.down_blocks):
        for number, _ in enumerate(block.resnets):
            yield f"down_blocks.{level}.resnets.{number}", f"input_blocks.{place}.0"
            yield f"down_blocks.{level}.attentions.{number}", f"input_blocks.{place}.1"
            place += 1
        if block.downsamplers:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    yield from {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}.items()
    yield "mid_block.attentions.0", "middle_block.1"
    place = 0
    for level, block in enumerate(unet.up_blocks):
        for number, _ in enumerate(block.resnets):
            yield f"up_blocks.{level}.resnets.{number}", f"output_blocks.{place}.0"
            yield f"up_blocks.{level}.attentions.{number}", f"output_blocks.{place}.1"
            place += 1
        attends = len(getattr(block, "attentions", None) or ())
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{place - 1}.{2 if attends else 1}.conv"


def vae_names(vae: Any) -> Names:
    levels = len(vae.config.block_out_channels)
    yield from ((f"{side}.conv_norm_out", f"{side}.norm_out") for side in ("encoder", "decoder"))
    for level in range(levels):
        yield f"encoder.down_blocks.{level}.downsamplers.0", f"encoder.down.{level}.downsample"
        yield f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.up.{levels - 1 - level}.upsample"
        for number in range(4):
            yield f"encoder.down_blocks.{level}.resnets.{number}", f"encoder.down.{level}.block.{number}"
            yield f"decoder.up_blocks.{level}.resnets.{number}", f"decoder.up.{levels - 1 - level}.block.{number}"
    for side in ("encoder", "decoder"):
        yield from ((f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}") for i in (0, 1))
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(name: str, modules: dict[str, str], inner: dict[str, str]) -> str:
    """A tensor's name, by the longest module that begins it and what is inside of that."""
    start = max((m for m in modules if name.startswith(f"{m}.")), key=len, default=None)
    if start is None:
        return name
    rest = name.removeprefix(f"{start}.")
    for theirs, ours in inner.items():
        if rest.startswith(f"{theirs}."):
            rest = ours + rest.removeprefix(theirs)
            break
    return f"{modules[start]}.{rest}"


def open_clip(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A CLIP text encoder of transformers as open_clip holds it: query, key and value in one matrix."""
    found = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for i in range(layers):
            theirs, ours = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            joined = torch.cat([state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            found[f"{ours}.attn.in_proj_{kind}"] = joined
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                found[f"{ours}.{b}.{kind}"] = state[f"{theirs}.{a}.{kind}"]
    return found


def ldm_state(pipe: Any) -> dict[str, Tensor]:
    """All tensors of a Stable Diffusion or SDXL pipeline."""
    two = getattr(pipe, "text_encoder_2", None)
    found: dict[str, Tensor] = {}
    modules = dict(unet_names(pipe.unet))
    for name, value in pipe.unet.state_dict().items():
        residual = RESIDUAL if ".resnets." in name else {}
        found[f"model.diffusion_model.{renamed(name, modules, residual)}"] = value
    modules = dict(vae_names(pipe.vae))
    for name, value in pipe.vae.state_dict().items():
        inner = ATTENTION if ".attentions." in name else {"conv_shortcut": "nin_shortcut"}
        pixel = ".attentions." in name and value.ndim == 2
        found[f"first_stage_model.{renamed(name, modules, inner)}"] = value[:, :, None, None] if pixel else value
    first = "conditioner.embedders.0.transformer." if two is not None else "cond_stage_model.transformer."
    for name, value in pipe.text_encoder.state_dict().items():
        found[first + (name if name.startswith("text_model.") else f"text_model.{name}")] = value
    if two is not None:
        ours = open_clip(two.state_dict(), two.config.num_hidden_layers)
        found |= {f"conditioner.embedders.1.model.{name}": value for name, value in ours.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def save_ldm(pipe: Any, file: Path) -> Path:
    save_file(ldm_state(pipe), file)
    return file
