"""What leaves the package for plain diffusers: the adapters as a LoRA file, and how to sample them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["loads_lora", "plain_lora", "snippet", "write_lora"]


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


def loads_lora(pipeline: type, denoiser: str) -> bool:
    """Whether a class of diffusers writes and reads LoRA files of this network."""
    save = getattr(pipeline, "save_lora_weights", None)
    return save is not None and f"{denoiser}_lora_layers" in inspect.signature(save).parameters


def write_lora(pipe: Any, denoiser: str, folder: Path, scale: float) -> None:
    """Write the adapters as the pipeline's own `pytorch_lora_weights.safetensors`, or as a folder of peft where it has none.

    Args:
        pipe: The pipeline.
        denoiser: Its part that carries them.
        folder: Where to.
        scale: alpha / rank.
    """
    network = getattr(pipe, denoiser)
    layers = plain_lora(network, scale)
    if loads_lora(type(pipe), denoiser):
        type(pipe).save_lora_weights(folder, **{f"{denoiser}_lora_layers": layers}, safe_serialization=True)
        return
    config = copy.copy(network.peft_config["default"])
    config.lora_alpha, config.inference_mode = config.r, True  # the scale is in the weights
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{name}": value for name, value in layers.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def only_in(window: Sequence[int]) -> str:
    """Lines that switch the adapters off outside of a stretch of steps."""
    start, stop = window
    return f"""


def adapters(step):  # they are for steps {start} to {stop - 1}; the others are the prior's
    (pipe.enable_lora if {start} <= step < {stop} else pipe.disable_lora)()


def switched(pipe, step, timestep, tensors):
    adapters((step + 1) % pipe.num_timesteps)
    return tensors


adapters(0)
settings["callback_on_step_end"] = switched"""


def snippet(
    pipeline: str,
    denoiser: str,
    load: Sequence[str],
    scheduler: str,
    folder: str,
    prompt: str,
    settings: Mapping[str, Any],
    images: str = "images",
    window: Sequence[int] | None = None,
) -> str:
    """Python that samples an exported posterior with plain diffusers.

    Args:
        pipeline: Class in diffusers.
        denoiser: Its part that carries the adapters.
        load: Lines that load the prior as `pipe`.
        scheduler: Class in diffusers, or in `diffusion_rtb.schedulers`; its config lies in the exported folder.
        folder: Where the export lies.
        prompt: Arguments of the pipeline's call for one prompt, as Python.
        settings: Further arguments.
        images: What the pipeline's answer calls them.
        window: The stretch of steps that the adapters are for, where the scheduler has one; the others are the prior's.
    """
    import diffusers

    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    plain = loads_lora(getattr(diffusers, pipeline), denoiser)
    adapters = "pipe.load_lora_weights(folder)" if plain else f"PeftModel.from_pretrained(pipe.{denoiser}, folder)"
    given = f"{prompt}, " if prompt else ""
    imports = f"from diffusers import {', '.join(sorted([scheduler, pipeline]))}"
    if not hasattr(diffusers, scheduler):
        imports = f"from diffusers import {pipeline}\nfrom diffusion_rtb.schedulers import {scheduler}"
    return f"""import torch
{imports}
{"" if plain else "from peft import PeftModel" + chr(10)}
folder = {folder!r}
{chr(10).join(load)}
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
{adapters}
settings = dict({options}){"" if window is None else only_in(window)}
torch.manual_seed(0)  # some pipelines give their scheduler no generator
image = pipe({given}generator=torch.Generator().manual_seed(0), **settings).{images}[0]"""
