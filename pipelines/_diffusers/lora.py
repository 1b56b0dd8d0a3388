"""The posterior as LoRA inside the prior's own network, by diffusers' `add_adapter`, or peft where a network has none.

    W x  ->  W x + (alpha / rank) · B A x,    B = 0 at the start

so the posterior starts as the prior, and the prior is the same network with its adapters off: no second copy.
LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

__all__ = ["ATTENTION", "adapters_off", "add_lora", "check_only", "lora_numbers", "lora_parameters"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention block of diffusers."""


def add_lora(network: Any, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int) -> None:
    """Add float32 LoRA layers to the modules whose names end in `target_modules`; A is drawn from `seed`, B is 0.

    Raises:
        ValueError: rank or alpha is not positive, a target matches no linear or convolution, or there are adapters already.
    """
    if getattr(network, "peft_config", None):
        raise ValueError("The network already carries adapters; attach the posterior once, to a freshly loaded prior.")
    if rank < 1 or alpha <= 0:
        raise ValueError(
            f"rank={rank} and alpha={alpha}: a LoRA needs rank >= 1 and alpha > 0, for example rank 8, alpha 8."
        )
    check_targets(network, target_modules)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator; ours replaces it below
        if hasattr(network, "add_adapter"):
            network.add_adapter(config)
        else:
            inject_adapter_in_model(config, network)
            network.peft_config = {"default": config}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(network).items():
        start = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        parameter.data = start.to(parameter.device)
    network.eval()


def check_targets(network: nn.Module, target_modules: Sequence[str]) -> None:
    """Every target must end the name of at least one linear or convolution and of nothing else.

    Raises:
        ValueError: it does not; the message lists the nearest names.
    """
    kinds = {name: isinstance(module, nn.Linear | nn.Conv2d) for name, module in network.named_modules() if name}
    examples = sorted({_ending(name) for name, fits in kinds.items() if fits})
    if not target_modules:
        raise ValueError(f"target_modules is empty; name at least one of {', '.join(examples)}.")
    for target in target_modules:
        matched = [fits for name, fits in kinds.items() if name == target or name.endswith(f".{target}")]
        if not matched or not all(matched):
            reason = (
                "matches nothing" if not matched else "also matches modules that are neither linear nor a convolution"
            )
            near = get_close_matches(target, examples, n=3) or examples
            raise ValueError(
                f"target_modules: {target!r} {reason} in {type(network).__name__}; take for example {', '.join(near)}."
            )


def _ending(name: str) -> str:
    """The shortest telling end of a module's name: the last part, with what stands before a number."""
    parts = name.split(".")
    while parts and parts[-1].isdigit() and len(parts) > 1:
        return ".".join(parts[-2:])
    return parts[-1]


def lora_numbers(shapes: Mapping[str, Sequence[int]], rank: int, target_modules: Sequence[str]) -> int:
    """How many numbers a LoRA on a network has whose weights have these shapes: rank·(in + out) for each matrix it adapts.

    Of a convolution A has the kernel, and B is 1 x 1.
    """
    ends = tuple(f".{target}.weight" for target in target_modules)
    adapted = [shape for name, shape in shapes.items() if f".{name}".endswith(ends) and len(shape) > 1]
    return sum(rank * (math.prod(shape[1:]) + shape[0]) for shape in adapted)


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, in the network's order."""
    return {name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}


def check_only(pipe: Any, network: nn.Module, path: Any) -> None:
    """Refuse a LoRA with layers in other parts of a pipeline than this network; ValueError."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = {
        name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and part is not network
    }
    other = [name for name, part in parts.items() if any(isinstance(m, BaseTunerLayer) for m in part.modules())]
    if other:
        raise ValueError(
            f"{path} is a LoRA of {' and '.join(other)}, too: its posterior is conditioned otherwise than its prior, and no "
            "log-density compares them. Evaluate a folder of its pictures instead."
        )


@contextmanager
def adapters_off(network: Any) -> Iterator[None]:
    """Inside the block the network is the prior. Nests; a network without adapters is the prior already."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if all(layer.disable_adapters for layer in layers):
        yield
        return
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
