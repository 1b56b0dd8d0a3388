r"""Bytes: of networks by the headers of their files, of modules, optimizers and graphs as torch counts them.

AdamW       2 moments of every trained number, beside the number and its gradient: 4 · numel · itemsize in all, and a counter
a graph     the distinct storages that autograd holds for backward, without the parameters
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_rtb.abilities import inner_rewards
from diffusion_rtb.chain.rows import Rows

__all__ = ["GraphBytes", "Header", "bytes_of", "module_bytes", "network_header", "optimizer_bytes", "reward_networks"]


@dataclass(frozen=True)
class Header:
    """What the headers of a network's safetensors files say."""

    numbers: int
    """Entries of all tensors."""
    on_disk: int
    """Bytes of all tensors in the files."""
    loaded: int
    """Bytes once floating tensors are of the dtype asked for."""
    stored: str
    """dtypes in the files, as safetensors calls them: "F32", "BF16, F32"."""


def network_header(files: Sequence[Path], dtype: torch.dtype) -> Header:
    """Sum up the headers of a network's files; nothing is loaded.

    Args:
        files: One, or the shards.
        dtype: That floating tensors will be loaded in.
    """
    numbers = on_disk = loaded = 0
    kinds: set[str] = set()
    for file in files:
        with safe_open(file, framework="np") as opened:  # for torch it would reserve memory of the file's size
            for name in opened.keys():
                entry = opened.get_slice(name)
                kind, count = str(entry.get_dtype()), math.prod(entry.get_shape())
                size = _itemsize(kind)
                numbers, on_disk = numbers + count, on_disk + count * size
                loaded += count * (dtype.itemsize if kind.startswith(("F", "BF")) else size)
                kinds.add(kind)
    return Header(numbers, on_disk, loaded, ", ".join(sorted(kinds)))


def _itemsize(kind: str) -> int:
    """Bytes of one number of a dtype as safetensors writes it: F32, BF16, F8_E4M3, I64, BOOL."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


def module_bytes(*modules: nn.Module) -> int:
    """Parameters and buffers of modules; what they share counts once."""
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return bytes_of(held)


def bytes_of(tensors: Iterable[Tensor] | Rows) -> int:
    """Of the entries of tensors, each tensor once; of a batch, of all that it holds."""
    if isinstance(tensors, Rows):
        held = [getattr(tensors, f.name) for f in fields(tensors)]  # type: ignore[arg-type]
        inner = sum(bytes_of(value) for value in held if isinstance(value, Rows))
        return inner + bytes_of(value for value in held if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the state that an optimizer has by now: after its first step, that of all parameters with a gradient."""
    return bytes_of(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def reward_networks(reward: Any) -> list[nn.Module]:
    """The networks that a reward holds, in its attributes, theirs, and those of the rewards that it is made of."""
    found: list[nn.Module] = [reward] if isinstance(reward, nn.Module) else []
    for held in () if found else _held(reward, depth=3):
        found.append(held)
    for inner in inner_rewards(reward).values():
        found += reward_networks(inner)
    return list({id(module): module for module in found}.values())


def _held(thing: Any, depth: int) -> list[nn.Module]:
    if isinstance(thing, nn.Module):
        return [thing]
    if isinstance(thing, list | tuple):
        inside = list(thing)
    elif isinstance(thing, dict):
        inside = list(thing.values())
    else:
        inside = list(vars(thing).values()) if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    return [module for part in inside for module in _held(part, depth - 1)] if depth else []


class GraphBytes:
    """Bytes of the distinct storages that autograd holds for backward: `now`, and `peak` at most.

    with GraphBytes(network.parameters()) as graph: loss(...).backward()

    Args:
        known: Tensors that are there without any graph, such as parameters; they do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Box.opened)

    def __enter__(self) -> GraphBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def during(self, action: Callable[[], Any]) -> int:
        """`peak` of an action."""
        with self:
            action()
        return self.peak

    def _pack(self, tensor: Tensor) -> _Box:
        box, storage = _Box(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._known:
            self._holders[place] = self._holders.get(place, 0) + 1
            if self._holders[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._release, place, size)
        return box

    def _release(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if self._holders[place] == 0:
            del self._holders[place]
            self.now -= size


class _Box:
    """Whose end is the end of what autograd holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def opened(self) -> Tensor:
        return self.tensor
