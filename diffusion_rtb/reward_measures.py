"""Numbers about a reward's calls: seconds, memory, derivatives, and what its values go along with."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

__all__ = ["Memory", "Slope", "brightness", "jpeg_bits", "peak_memory", "seconds", "slope", "spearman"]

INTERVAL = 0.002
"""Seconds between two looks at the process's memory."""


@dataclass
class Memory:
    """How much memory a block took at most beyond what was taken before it."""

    mib: float = 0.0
    what: str = "of the process"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """Measure a block: allocated memory of an accelerator, resident memory of the process on a CPU.

    The latter is looked at every 2 ms, and holds only what the process did not have already.
    """
    result = Memory()
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        yield result
        result.mib = (module.max_memory_allocated(device) - before) / 2**20
        result.what = f"of {device}"
        return
    with _watched() as watch:
        yield result
    result.mib = max(watch.highest - watch.first, 0) / 2**20


@dataclass
class _Watch:
    first: int = 0
    highest: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _watched() -> Iterator[_Watch]:
    import psutil

    process = psutil.Process()
    watch = _Watch()
    watch.first = watch.highest = process.memory_info().rss

    def look() -> None:
        while not watch.done.wait(INTERVAL):
            watch.highest = max(watch.highest, process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
        watch.highest = max(watch.highest, process.memory_info().rss)
    finally:
        watch.done.set()
        thread.join()


@contextmanager
def seconds(device: torch.device, spent: list[float]) -> Iterator[None]:
    """Append the seconds that a block takes, the work it leaves on an accelerator included."""
    _wait(device)
    start = perf_counter()
    yield
    _wait(device)
    spent.append(perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@dataclass(frozen=True)
class Slope:
    """What gradients promise for a small step uphill, and what the step brings."""

    promised: float
    found: float
    finite: bool


def slope(reward: Any, x: Float[Tensor, "batch *dims"], prompts: list[str]) -> Slope | None:
    """Compare gradients with respect to samples with a central difference; None: the values carry no gradients.

    The step is one level of an 8-bit picture up or down in each number, as the gradient's sign says: whole levels, since
    rewards may round pictures to 8 bits. For vectors it is a thousandth of their largest number.
    """
    images = x.ndim == 4
    wanted = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = reward(wanted, list(prompts))
        if not values.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(values.sum(), wanted, allow_unused=True)
    if gradient is None:
        return None
    if not gradient.isfinite().all():
        return Slope(float("nan"), float("nan"), finite=False)
    step = gradient.sign() * (1 / 255 if images else 1e-3 * max(float(x.abs().max()), 1e-6))
    ends = [x + step, x - step]
    if images:
        ends = [end.clamp(0, 1) for end in ends]
    with torch.no_grad():
        up, down = (reward(end, list(prompts)).double() for end in ends)
    promised = float((gradient.double() * (ends[0] - ends[1]).double()).sum())
    brought = float((up - down).sum())
    return Slope(promised, brought, finite=math.isfinite(brought))


def spearman(one: Float[Tensor, " batch"], other: Float[Tensor, " batch"]) -> float | None:
    """Rank correlation in [-1, 1], ties with their mean rank; None where one of the two does not vary."""
    a, b = (_ranks(values) for values in (one, other))
    if a.std(correction=0) == 0 or b.std(correction=0) == 0:
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _ranks(values: Tensor) -> Float[Tensor, " batch"]:
    values = values.detach().double().cpu()
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def jpeg_bits(images: Float[Tensor, "batch 3 height width"], quality: int = 95) -> Float[Tensor, " batch"]:
    """Bits per pixel of each picture as a JPEG file."""
    levels = (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    sizes = []
    for picture in levels:
        with io.BytesIO() as file:
            Image.fromarray(picture.numpy()).save(file, format="JPEG", quality=quality)
            sizes.append(8 * file.tell() / (picture.shape[0] * picture.shape[1]))
    return torch.tensor(sizes)


def brightness(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Mean over pixels and channels, in [0, 1]."""
    return images.float().flatten(1).mean(1).cpu()
