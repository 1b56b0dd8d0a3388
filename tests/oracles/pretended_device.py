"""A pretended accelerator: real numbers, computed on the CPU, in tensors that say that they are on `pretended:0`.

    with counted() as device:
        network.to(DEVICE)
        ...
    device.waits            how often the host waited for the device, by the line of the project that made it wait
    device.sends            blocking copies to it, in the same way

As on CUDA, mixing its tensors with the CPU's raises, and so does `.numpy()`. A wait is what the host has to know before it can go
on: `float(t)`, `bool(t)`, `t.item()`, `t.tolist()`, `torch.equal`, the size of `nonzero` or of a boolean mask, a copy to the CPU. A
blocking copy to the device waits as well where its memory is not pinned, and is counted apart. All of this says nothing about
speed, memory or kernels.

Built on torch's Python back end for PrivateUse1 (torch 2.10 and later). It is registered once per process by importing this module,
and cannot be taken back: what uses it runs in a process of its own.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import backend_registration

__all__ = ["DEVICE", "Counts", "PretendedTensor", "counted"]

NAME = "pretended"
DEVICE = f"{NAME}:0"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
aten = torch.ops.aten


@dataclass
class Counts:
    """What the host did between two points: each place is "file:line code" of the project, or "libraries"."""

    waits: Counter[str] = field(default_factory=Counter)
    sends: Counter[str] = field(default_factory=Counter)


_open: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Count inside the block; blocks nest."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


def _count(kind: str) -> None:
    if _open:
        place = _place()
        for counts in _open:
            getattr(counts, kind)[place] += 1


def _place() -> str:
    """The innermost line of the project that is being executed."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "site-packages" not in name and name != __file__:
            return f"{os.path.relpath(name, ROOT)}:{frame.f_lineno} {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back  # type: ignore[assignment]
    return "libraries"


class PretendedTensor(torch.Tensor):
    """Holds a CPU tensor `held` and says that it is on the pretended device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[PretendedTensor], held: torch.Tensor) -> PretendedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE),
        )
        tensor.held = held
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held!r})"

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), specification)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        _count("waits")
        return self.held.tolist()

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
FOR_THE_HOST = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.allclose.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
"""Operations that answer a number, or a tensor whose size depends on numbers."""


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat = [t for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in flat if isinstance(t, PretendedTensor)]
    _check_devices(func, args, kwargs, flat)
    mask = func in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in there if t is not args[0])
    if there and (mask or func in FOR_THE_HOST):
        _count("waits")
    goes_there = _answers_there(func, args, kwargs, bool(there))
    if func in COPIES:
        _count_copy(func, args, kwargs, goes_there)
    options = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    answer = func(*_mapped(_held, args), **_mapped(_held, options))
    return _wrapped(func, answer, there) if goes_there else answer


def _leaves(value: Any) -> Iterator[Any]:
    """What is in tuples, lists and dicts; torch's own way of walking through them takes half of the time of a small network."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return change(value)


def _check_devices(func: Any, args: Any, kwargs: Any, flat: list[torch.Tensor]) -> None:
    here = [t for t in flat if not isinstance(t, PretendedTensor)]
    if len(here) == len(flat):
        return
    if func in INDEXED:
        if func is aten.index.Tensor and not isinstance(args[0], PretendedTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    elif func not in COPIES and any(t.dim() > 0 for t in here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({func})"
        )
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _answers_there(func: Any, args: Any, kwargs: Any, there: bool) -> bool:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == NAME
    if func in (aten.copy_.default, *INDEXED):
        return isinstance(args[0], PretendedTensor)
    return there


def _count_copy(func: Any, args: Any, kwargs: Any, goes_there: bool) -> None:
    source = args[1] if func is aten.copy_.default else args[0]
    blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
    if isinstance(source, PretendedTensor) and not goes_there:
        _count("waits")
    elif goes_there and not isinstance(source, PretendedTensor) and blocking and source.numel() > 0:
        _count("sends")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendedTensor) else value


def _wrapped(func: Any, answer: Any, given: list[PretendedTensor]) -> Any:
    """Every tensor of an answer as one of this device; what was changed in place as the very tensor that was given."""
    own = {id(t.held): t for t in given} if func._schema.is_mutable else {}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, PretendedTensor):
            return value
        return own[id(value)] if id(value) in own else PretendedTensor(value)

    return _mapped(wrap, answer)


# --- What torch asks a device for.


class _Module(backend_registration._DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Any, device: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`torch.tensor(..., device=...)` comes here, without the dispatcher."""
    _count_copy(aten.copy_.default, (target, source, non_blocking), {}, isinstance(target, PretendedTensor))
    _held(target).copy_(_held(source))
    return target


def _number(tensor: torch.Tensor) -> Any:
    """`torch.tensor([t])` of a number on the device comes here, without the dispatcher."""
    _count("waits")
    return _held(tensor).item()


def _register() -> torch.library.Library:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")

    def there(make: Any) -> Any:
        return lambda *args, device=None, layout=None, pin_memory=None, **kwargs: PretendedTensor(make(*args, **kwargs))

    library.impl("empty_strided", there(torch.empty_strided), "PrivateUse1")
    library.impl("empty.memory_format", there(torch.empty), "PrivateUse1")
    for sized_later in ("arange", "arange.start", "arange.start_step"):
        library.impl(sized_later, there(torch.arange), "PrivateUse1")
    library.impl("linspace", there(torch.linspace), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", _number, "PrivateUse1")
    return library


_library = _register()
