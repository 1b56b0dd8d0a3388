"""What leaves the package for plain diffusers: the adapters as a LoRA file, and how to sample a posterior."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Loading", "loading_full", "loading_lora", "plain_lora", "snippet", "write_lora"]


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


@dataclass(frozen=True)
class Loading:
    """Python that makes the posterior of the prior's `pipe`, from `folder`."""

    code: str
    names: Sequence[str] = ()
    """Further classes of diffusers that it needs."""
    imports: str = ""
    """Further lines that it needs."""
    aside: str = ""
    """A line that puts the prior aside for `switch`."""
    switch: Callable[[str], str] = str
    """A line that has the posterior at work where a condition holds, and else the prior."""


def loading_lora(pipeline: type, denoiser: str) -> Loading:
    """A LoRA, by the pipeline's own loader or, where it has none, by peft."""

    def switch(condition: str) -> str:
        return f"(pipe.enable_lora if {condition} else pipe.disable_lora)()"

    if loads_lora(pipeline, denoiser):
        return Loading("pipe.load_lora_weights(folder)", switch=switch)
    return Loading(
        f"PeftModel.from_pretrained(pipe.{denoiser}, folder)", imports="from peft import PeftModel\n", switch=switch
    )


def loading_full(network: str, denoiser: str, dtype: str) -> Loading:
    """A whole network, of this class of diffusers, in the place of the prior's."""
    return Loading(
        f"pipe.{denoiser} = posterior = {network}.from_pretrained(folder, subfolder={denoiser!r}, dtype=torch.{dtype})",
        (network,),
        aside=f"prior = pipe.{denoiser}\n",
        switch=lambda condition: f"pipe.{denoiser} = posterior if {condition} else prior",
    )


def only_in(window: Sequence[int], loading: Loading) -> str:
    """Lines that have the prior outside of a stretch of steps."""
    start, stop = window
    return f"""


def adapters(step):  # they are for steps {start} to {stop - 1}; the others are the prior's
    {loading.switch(f"{start} <= step < {stop}")}


def switched(pipe, step, timestep, tensors):
    adapters((step + 1) % pipe.num_timesteps)
    return tensors


adapters(0)
settings["callback_on_step_end"] = switched"""


def snippet(
    pipeline: str,
    load: Sequence[str],
    scheduler: str,
    folder: str,
    prompt: str,
    settings: Mapping[str, Any],
    loading: Loading,
    images: str = "images",
    window: Sequence[int] | None = None,
) -> str:
    """Python that samples an exported posterior with plain diffusers.

    Args:
        pipeline: Class in diffusers.
        load: Lines that load the prior as `pipe`.
        scheduler: Class in diffusers, or in `diffusion_rtb.schedulers`; its config lies in the exported folder.
        folder: Where the export lies.
        prompt: Arguments of the pipeline's call for one prompt, as Python.
        settings: Further arguments.
        loading: How the posterior is loaded.
        images: What the pipeline's answer calls them.
        window: The stretch of steps that the posterior is for, where the scheduler has one; the others are the prior's.
    """
    import diffusers

    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    given = f"{prompt}, " if prompt else ""
    stock = hasattr(diffusers, scheduler)
    names = sorted({pipeline, *loading.names, *([scheduler] if stock else [])})
    imports = f"from diffusers import {', '.join(names)}"
    if not stock:
        imports += f"\nfrom diffusion_rtb.schedulers import {scheduler}"
    return f"""import torch
{imports}
{loading.imports}
folder = {folder!r}
{chr(10).join(load)}
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
{"" if window is None else loading.aside}{loading.code}
settings = dict({options}){"" if window is None else only_in(window, loading)}
torch.manual_seed(0)  # some pipelines give their scheduler no generator
image = pipe({given}generator=torch.Generator().manual_seed(0), **settings).{images}[0]"""
