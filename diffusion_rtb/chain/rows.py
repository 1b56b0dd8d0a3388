"""Tensors over the same rows, cut, moved and joined as a whole: no field can go stale alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Rows"]

R = TypeVar("R", bound="Rows")


class Rows:
    """Base of frozen dataclasses whose fields have one entry per row: tensors, `Rows`, mappings of tensors, or None: unknown."""

    shared: ClassVar[frozenset[str]] = frozenset()
    """Fields that are the same for all rows."""

    def __len__(self) -> int:
        return len(next(getattr(self, f.name) for f in fields(self) if f.name not in self.shared))  # type: ignore[arg-type]

    def __getitem__(self: R, index: Sequence[int] | Int[Tensor, " rows"] | slice) -> R:
        """The rows at `index`."""

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: cut(item) for key, item in value.items()}
            whole = isinstance(index, slice) or isinstance(value, Rows)
            return value[index if whole else torch.as_tensor(index, device=value.device)]

        return self._changed(cut, self.shared)

    def to(self: R, device: torch.device | str) -> R:
        """The same on another device; the host waits for what comes to it, and not for what leaves page-locked memory."""
        leaving = torch.device(device).type != "cpu"

        def there(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: there(item) for key, item in value.items()}
            return value.to(device) if isinstance(value, Rows) else value.to(device, non_blocking=leaving)

        return self._changed(there)

    @classmethod
    def cat(cls: type[R], parts: Sequence[R]) -> R:
        """Join in order; what is optional is known afterwards only if it was known in every part."""
        found = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}  # type: ignore[arg-type]
        return replace(parts[0], **{name: _joined(of) for name, of in found.items() if name not in cls.shared})  # type: ignore[type-var]

    def _changed(self: R, change: Callable[[Any], Any], but: frozenset[str] = frozenset()) -> R:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in but}  # type: ignore[arg-type]
        return replace(self, **{name: None if value is None else change(value) for name, value in found.items()})  # type: ignore[type-var]


def _joined(values: Sequence[Any]) -> Any:
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Mapping):
        return {key: _joined([value[key] for value in values]) for key in values[0]}
    return type(values[0]).cat(values) if isinstance(values[0], Rows) else torch.cat(list(values))
