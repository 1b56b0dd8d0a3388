"""What leaves the package: LoRA weights that plain diffusers loads, and the lines of Python that sample them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["plain_lora", "snippet"]


def plain_lora(network: nn.Module, scale: float) -> dict[str, Tensor]:
    """The adapters as `save_lora_weights` wants them, float32 on the CPU, with `scale` = alpha / rank multiplied into B.

    A LoRA file without further data means alpha = rank to every diffusers version and to other tools, so the scale
    goes into the weights instead of into metadata that older readers ignore. The names stay peft's (lora_A, lora_B):
    `convert_state_dict_to_diffusers` renames attention projections only, and a file of mixed names loses those layers
    without an error when it is loaded.
    """
    from peft import get_peft_model_state_dict

    return {
        name: (value * scale if ".lora_B" in name else value).detach().float().cpu().contiguous()
        for name, value in get_peft_model_state_dict(network).items()
    }


def snippet(base_model: str, scheduler: Any, dtype: str, folder: str, prompt: str, settings: Mapping[str, Any]) -> str:
    """Python that samples an exported posterior with plain diffusers.

    Args:
        base_model: Hub id or folder of the prior.
        scheduler: Its config lies in the exported folder.
        dtype: Of the networks, such as "float32".
        folder: Where the export lies.
        prompt: An example.
        settings: Further arguments of the pipeline's call.
    """
    sampler = type(scheduler).__name__
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"""import torch
from diffusers import {", ".join(sorted([sampler, "StableDiffusionPipeline"]))}

folder = {folder!r}
pipe = StableDiffusionPipeline.from_pretrained({base_model!r}, dtype=torch.{dtype})
pipe.scheduler = {sampler}.from_pretrained(folder, subfolder="scheduler")
pipe.load_lora_weights(folder)
settings = dict({options})
image = pipe({prompt!r}, generator=torch.Generator().manual_seed(0), **settings).images[0]"""
