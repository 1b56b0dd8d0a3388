"""The posterior as trained weights of the prior's own network, all of them or those of some modules, by torch's `parametrize`.

    W  ->  W' in W's dtype,    W' = W at the start, in float32

so the posterior starts as the prior, to the last bit, and the prior is the same network with W, which stays as it is. What is
trained is held twice, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipelines._models.proof import quiet

__all__ = [
    "add_full",
    "full_numbers",
    "full_parameters",
    "network_class",
    "plain_weights",
    "prior_weights",
    "trained_names",
    "write_full",
]


class Trained(nn.Module):
    """What a network computes with instead of one of its weights, as long as it is on.

    Args:
        weight: Of the prior; `value` begins as it is.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.on = True
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.value = nn.Parameter(weight.detach().to(wide, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        """The posterior's weight, rounded to the network's precision; the prior's where it is off."""
        used = self.value.to(weight.dtype) if self.on else weight
        # torch multiplies in another order, and rounds otherwise, where a weight requires gradients: outside of training none does.
        return used if torch.is_grad_enabled() else used.detach()


def trained_names(names: Collection[str], target_modules: Sequence[str] | None) -> list[str]:
    """Which of a network's weights are trained: all, or those of the modules whose names end in `target_modules`.

    Raises:
        ValueError: a target matches no module; the message lists the nearest names.
    """
    if target_modules is None:
        return list(names)
    marks = {target: f".{target}." for target in target_modules}
    for target, mark in marks.items():
        if not any(mark in f".{name}" for name in names):
            modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in names} - {""})
            near = get_close_matches(target, modules, n=3) or [name for name in modules if not name.isdigit()][:8]
            raise ValueError(
                f"target_modules: {target!r} matches no module that has weights; take for example {', '.join(near)}."
            )
    return [name for name in names if any(mark in f".{name}" for mark in marks.values())]


def full_numbers(shapes: Mapping[str, Sequence[int]], target_modules: Sequence[str] | None) -> int:
    """How many numbers are trained of a network whose weights have these shapes."""
    return sum(math.prod(shapes[name]) for name in trained_names(shapes, target_modules))


def add_full(network: nn.Module, target_modules: Sequence[str] | None) -> None:
    """Make weights of a network trainable, float32 whatever it computes in; a weight that modules share stays shared.

    Raises:
        ValueError: there is a posterior already, a target matches nothing, or a weight is not of floating point.
    """
    if full_parameters(network) or getattr(network, "peft_config", None):
        raise ValueError("The network already carries a posterior; attach it once, to a freshly loaded prior.")
    held = dict(network.named_parameters(remove_duplicate=False))
    names = trained_names(held, target_modules)
    for name in names:
        if not held[name].is_floating_point() or held[name].element_size() < 2:
            raise ValueError(
                f"{name} of {type(network).__name__} is quantised ({held[name].dtype}), and numbers of so few values cannot be "
                "trained in full: load the prior in float32, float16 or bfloat16, or train a LoRA."
            )
    own = {weight: Trained(weight) for weight in {held[name]: None for name in names}}
    for name in names:
        module, _, weight = name.rpartition(".")
        parametrize.register_parametrization(network.get_submodule(module), weight, own[held[name]])
    network.eval()


def _trained(network: nn.Module) -> Iterator[tuple[str, str, Trained]]:
    """Prefix of the module, name of the weight, and what stands for it."""
    for module_name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            prefix = f"{module_name}." if module_name else ""
            held: Any = module.parametrizations
            for name, chain in held.items():
                yield from ((prefix, name, step) for step in chain if isinstance(step, Trained))


def full_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights by the names that they have in the stock network, each once."""
    found: dict[nn.Parameter, str] = {}
    for prefix, name, step in _trained(network):
        found.setdefault(step.value, f"{prefix}{name}")
    return {name: value for value, name in found.items()}


@contextmanager
def prior_weights(network: nn.Module) -> Iterator[None]:
    """Inside the block the network is the prior. Nests."""
    steps = [step for _, _, step in _trained(network) if step.on]
    for step in steps:
        step.on = False
    try:
        yield
    finally:
        for step in steps:
            step.on = True


@torch.no_grad()
def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the stock network that computes what this one computes as posterior, on the CPU, in its precision."""
    held = dict(network.state_dict())
    for prefix, name, step in _trained(network):
        place = f"{prefix}parametrizations.{name}"
        del held[f"{place}.0.value"]
        held[f"{prefix}{name}"] = step.value.to(held.pop(f"{place}.original").dtype)
    return {name: value.detach().cpu().contiguous() for name, value in held.items()}


def network_class(network: nn.Module) -> Any:
    """The class of diffusers that a network is of, also where a weight of its own is trained."""
    return parametrize.type_before_parametrizations(network)


def write_full(network: Any, folder: Path) -> None:
    """Write the posterior's whole network as diffusers writes networks: a config and safetensors, in shards where it is large."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        stock = network_class(network).from_config(network.config)
    stock.load_state_dict(plain_weights(network), assign=True)
    with quiet():
        stock.save_pretrained(folder, safe_serialization=True)
