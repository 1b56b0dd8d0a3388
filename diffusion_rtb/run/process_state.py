"""Parameters, optimizer states and random generators as named tensors and JSON, exactly and without pickle.

A nested state becomes a JSON tree in which a tensor is replaced by `{"@tensor": name}`, a tuple by `{"@tuple": [...]}` and
a mapping whose keys JSON would change (an optimizer counts its parameters with integers) by `{"@items": [[key, value], ...]}`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_rtb.interfaces import Prior

__all__ = ["accelerator", "load_parameters", "pack_optimizer", "rng_state", "set_rng_state", "unpack_optimizer"]

log = logging.getLogger(__name__)


def load_parameters(prior: Prior, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved posterior parameters into the network.

    Raises:
        ValueError: names or shapes differ: the checkpoint is of another adapter.
    """
    parameters = prior.parameters()
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    saved = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != saved:
        differing = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        raise ValueError(
            f"The checkpoint's adapter does not fit this network: {len(differing)} parameters differ, first {differing[0]!r} "
            f"(here {shapes.get(differing[0])}, saved {saved.get(differing[0])}). Use the configuration of the run it belongs to."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def pack_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split `optimizer.state_dict()` into tensors by name and a JSON tree that refers to them.

    Raises:
        TypeError: the state holds something that is neither a tensor nor JSON; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {str(key): _pack(value, str(key), tensors) for key, value in state.items()}


def unpack_optimizer(tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `pack_optimizer` split, for `optimizer.load_state_dict`."""
    return {key: _unpack(value, tensors) for key, value in tree.items()}


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[where] = value.detach()
        return {"@tensor": where}
    if isinstance(value, Mapping):
        packed = [(key, _pack(item, f"{where}.{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("@") for key, _ in packed)
        return dict(packed) if plain else {"@items": [list(pair) for pair in packed]}
    if isinstance(value, list | tuple):
        entries = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return {"@tuple": entries} if isinstance(value, tuple) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"The optimizer state has a {type(value).__name__} at {where!r}; only tensors and JSON can be saved."
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "@tensor" in value:
        return tensors[value["@tensor"]]
    if "@tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["@tuple"])
    if "@items" in value:
        return {key: _unpack(item, tensors) for key, item in value["@items"]}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def rng_state() -> dict[str, Tensor]:
    """The states of the global generators: torch on the CPU and on this process's accelerator, Python's and NumPy's."""
    version, words, python_gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    mersenne = legacy["state"]
    result = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": _optional(python_gauss),
        "numpy": torch.tensor([*mersenne["key"].tolist(), mersenne["pos"]]),
        "numpy_gauss": _optional(legacy["gauss"] if legacy["has_gauss"] else None),
    }
    device = accelerator()
    if device is not None:
        result[device.type] = torch.get_device_module(device).get_rng_state()
    return result


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put the global generators back to what `rng_state` saw; an accelerator that is not here is left out with a warning."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), _value(state["python_gauss"])))
    *key, pos = state["numpy"].tolist()
    gauss = _value(state["numpy_gauss"])
    mersenne = {"key": np.array(key, dtype=np.uint32), "pos": pos}
    legacy = {"bit_generator": "MT19937", "state": mersenne, "has_gauss": int(gauss is not None), "gauss": gauss or 0.0}
    np.random.set_state(legacy)
    device = accelerator()
    here = None if device is None else device.type
    for name in state.keys() - {"torch", "python", "python_gauss", "numpy", "numpy_gauss"}:
        if device is None or name != here:
            log.warning(
                "The generator of %r is not restored: this process runs on %r; numbers may differ.", name, here or "cpu"
            )
        else:
            torch.get_device_module(device).set_rng_state(state[name])


def accelerator() -> torch.device | None:
    """This process's accelerator, if the machine has one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


def _value(tensor: Tensor) -> float | None:
    return tensor.item() if tensor.numel() else None
