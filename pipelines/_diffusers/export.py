"""What leaves the package for plain diffusers: the adapters as a LoRA file, and how to sample them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["plain_lora", "snippet", "write_lora"]


def plain_lora(network: nn.Module, scale: float) -> dict[str, Tensor]:
    """The adapters as `save_lora_weights` wants them, float32 on the CPU, with `scale` = alpha / rank multiplied into B.

    A LoRA file without further data means alpha = rank to every diffusers version, so the scale goes into the weights
    instead of into metadata that older readers ignore. The names stay peft's (lora_A, lora_B):
    `convert_state_dict_to_diffusers` renames attention projections only, and a file of mixed names loses those layers
    without an error when it is loaded. Other programs look attention layers up under other names and would draw the prior
    without a word: theirs is `kohya.kohya_lora`.
    """
    from peft import get_peft_model_state_dict

    return {
        name: (value * scale if ".lora_B" in name else value).detach().float().cpu().contiguous()
        for name, value in get_peft_model_state_dict(network).items()
    }


def write_lora(pipe: Any, denoiser: str, folder: Path, scale: float) -> None:
    """Write the adapters as `pytorch_lora_weights.safetensors`.

    Args:
        pipe: A pipeline whose class can save LoRA weights.
        denoiser: Its part that carries them.
        folder: Where to.
        scale: alpha / rank.
    """
    layers = {f"{denoiser}_lora_layers": plain_lora(getattr(pipe, denoiser), scale)}
    type(pipe).save_lora_weights(folder, **layers, safe_serialization=True)


def snippet(
    pipeline: str, base_model: str, scheduler: str, dtype: str, folder: str, prompt: str, settings: Mapping[str, Any]
) -> str:
    """Python that samples an exported posterior with plain diffusers.

    Args:
        pipeline: Class in diffusers.
        base_model: Hub id or folder of the prior.
        scheduler: Class in diffusers; its config lies in the exported folder.
        dtype: Of the networks, such as "float32".
        folder: Where the export lies.
        prompt: An example.
        settings: Further arguments of the pipeline's call.
    """
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"""import torch
from diffusers import {", ".join(sorted([scheduler, pipeline]))}

folder = {folder!r}
pipe = {pipeline}.from_pretrained({base_model!r}, dtype=torch.{dtype})
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
pipe.load_lora_weights(folder)
settings = dict({options})
image = pipe({prompt!r}, generator=torch.Generator().manual_seed(0), **settings).images[0]"""
