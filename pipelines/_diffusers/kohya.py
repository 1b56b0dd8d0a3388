"""The posterior for ComfyUI and the WebUIs: adapters under kohya's names, and the settings to use there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_rtb.files.plain_text import markdown_code

__all__ = ["KOHYA", "elsewhere", "kohya_lora", "write_kohya"]

KOHYA = "kohya_lora.safetensors"
"""File for ComfyUI and the WebUIs; no name that `load_lora_weights` would take for its own."""

SAMPLERS = {
    "DDIMScheduler": (
        "`euler_ancestral` or `ddpm`, scheduler `ddim_uniform` (its `ddim` draws no noise)",
        "DDIM, with *Eta for DDIM* at {eta} in the settings (by default it is 0, which draws no noise)",
    ),
    "DDPMScheduler": (
        "`ddpm`, scheduler `ddim_uniform`",
        "DDIM, with *Eta for DDIM* at 1 in the settings (by default it is 0, which draws no noise)",
    ),
    "EulerAncestralDiscreteScheduler": ("`euler_ancestral`, scheduler `normal`", "Euler a"),
}
"""diffusers' scheduler -> the nearest sampler of ComfyUI and of the WebUIs. With eta 1 DDIM, DDPM and ancestral Euler are one
transition, up to the scale of x; the programs differ in the noise levels that they visit and in the last step."""


def kohya_lora(network: nn.Module, alpha: float) -> dict[str, Tensor]:
    """The adapters of a UNet under kohya's names, as they were trained, float32 on the CPU.

        W x + (alpha / rank) · up(down(x))      lora_unet_MODULE.lora_down.weight, .lora_up.weight and .alpha, dots in MODULE as _

    ComfyUI, AUTOMATIC1111's WebUI, Forge and diffusers itself read them; alpha is in the file.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    named = {f"unet.{name}": value for name, value in get_peft_model_state_dict(network).items()}
    return {
        name: torch.tensor(float(alpha)) if name.endswith(".alpha") else value.detach().float().cpu().contiguous()
        for name, value in convert_state_dict_to_kohya(named).items()  # its alpha is the rank
    }


def write_kohya(network: nn.Module, folder: Path, alpha: float) -> None:
    """Write the adapters of a UNet as the file `KOHYA`."""
    from safetensors.torch import save_file

    save_file(kohya_lora(network, alpha), folder / KOHYA, metadata={"format": "pt"})


def elsewhere(base_model: str, scheduler: str, settings: Mapping[str, Any], models: str) -> str:
    """Markdown: which exported file is for which program, and the settings that come nearest to the posterior there.

    Args:
        base_model: Hub id or folder of the prior.
        scheduler: Its class in diffusers.
        settings: Further arguments of the pipeline's call.
        models: The kind of models that the programs run.
    """
    unknown = (f"the stochastic sampler nearest to {scheduler}",) * 2
    comfy, webui = (text.format(eta=f"{settings.get('eta', 1):g}") for text in SAMPLERS.get(scheduler, unknown))
    own, negative = settings.get("timesteps"), settings.get("negative_prompt")
    avoided = markdown_code(negative).replace("|", "\\|") if negative else "none"
    steps = (
        settings.get("num_inference_steps") if own is None else f"{len(own)}; the timesteps themselves cannot be set"
    )
    return f"""## Which file is for what

| program | file | where to put it |
|---|---|---|
| diffusers | `pytorch_lora_weights.safetensors` | anywhere, see above |
| ComfyUI | `{KOHYA}` | `models/loras`, node *Load LoRA*, strength 1 |
| AUTOMATIC1111's WebUI, Forge | `{KOHYA}` | `models/Lora`, `<lora:NAME:1>` in the prompt |
| other programs that read kohya's names | `{KOHYA}` | not looked into: they may leave out layers that are no attention |

Both files hold the same adapters; rename the second as you like. Load it on {markdown_code(base_model)} itself, with
these settings:

| setting | ComfyUI | AUTOMATIC1111's WebUI, Forge |
|---|---|---|
| sampler | {comfy} | {webui} |
| steps | {steps} | {steps} |
| CFG scale | {settings["guidance_scale"]:g} | {settings["guidance_scale"]:g} |
| negative prompt | {avoided} | {avoided} |
| size | {settings["width"]} x {settings["height"]} | {settings["width"]} x {settings["height"]} |

These programs have samplers of their own, which visit other noise levels, draw other noise and read prompts in their own way: they
approximate the posterior, and a seed does not give the image that diffusers gives. The names were checked against what the
programs look up; the file was not tried inside of them. They run {models} in the published sizes: a
base model of other sizes runs in diffusers alone."""
