"""Answer `torch.randn` inside a block: with probes, with given states, or row by row from one generator each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

__all__ = ["GivenStart", "ProbeNoise", "RowNoise", "signs"]

NORMAL = (torch.randn, torch.randn_like)


@functools.lru_cache(maxsize=8)
def signs(shape: tuple[int, ...], draw: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "*shape"]:
    """+1 and -1 in an order that depends on the number of the draw only."""
    generator = torch.Generator().manual_seed(draw)
    return (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(device, dtype)


class ProbeNoise(TorchFunctionMode):
    """Inside the block the n-th `torch.randn` or `randn_like` answers size·(±1, a pattern of its own); nothing is drawn."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.draws = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in NORMAL:
            return func(*args, **given)
        zero = _blank(func, args, given)
        if self.size == 0:
            return zero
        self.draws += 1
        return self.size * signs(tuple(zero.shape), self.draws - 1, zero.dtype, zero.device)


class RowNoise(TorchFunctionMode):
    """Inside the block a `torch.randn` that names no generator draws each row of its batch from that row's generator."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators
        self.drew = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in NORMAL or given.get("generator") is not None:
            return func(*args, **given)
        zero = _blank(func, args, given)
        if zero.ndim == 0 or len(zero) != len(self.generators):
            return func(*args, **given)
        self.drew = True
        size = (1, *zero.shape[1:])
        rows = [torch.randn(size, generator=g, dtype=zero.dtype, device=g.device) for g in self.generators]
        return torch.cat(rows).to(zero.device)


class GivenStart(TorchFunctionMode):
    """The first normal draw of x_T's shape answers x_T, for pipelines without `latents`: drawn at once or row by row.

    Args:
        x_T: What is answered; each row once.
        draw: Draw all the same, so that the generators go on as they would have.
    """

    def __init__(self, x_T: Float[Tensor, "batch *dims"], *, draw: bool) -> None:
        super().__init__()
        self.rows = list(x_T.split(1))
        self.draw = draw
        self.inside = False

    def __enter__(self) -> GivenStart:
        self.inside = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.inside:
            self.inside = False
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Leave the block early if x_T is taken: until then every call of torch passes through it, and costs some microseconds."""
        if self.inside and not self.rows and _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if not self.rows or func not in (*NORMAL, torch.normal, torch.Tensor.normal_):
            return func(*args, **given)
        blank = args[0] if func is torch.Tensor.normal_ else _blank(func, args, given)
        answer = self._taken(tuple(blank.shape))
        if answer is None:
            return func(*args, **given)
        if self.draw:
            func(*args, **given)
        return blank.copy_(answer)

    def _taken(self, size: tuple[int, ...]) -> Tensor | None:
        """The whole of x_T, or its next row, with or without a batch dimension; None for any other size."""
        one = tuple(self.rows[0].shape)
        if size == (len(self.rows), *one[1:]):
            answer, self.rows = torch.cat(self.rows), []
            return answer
        if size in (one, one[1:]):
            return self.rows.pop(0).reshape(size)
        return None


def _blank(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Zeros of the size, dtype and device of a draw."""
    options = {name: value for name, value in kwargs.items() if name not in ("generator", "mean", "std")}
    if func is torch.randn_like:
        return torch.zeros_like(options.pop("input", args[0] if args else None), **options)
    if func is torch.normal:
        moments = [x for x in (*args, kwargs.get("mean"), kwargs.get("std")) if isinstance(x, Tensor)]
        if moments:
            return torch.zeros_like(torch.broadcast_tensors(*moments)[0]).contiguous()
        args = args[2:]
    size = options.pop("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    return torch.zeros(tuple(size), **options)
