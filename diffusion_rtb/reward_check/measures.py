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

LEVELS = 255
"""Steps between black and white in 8 bits."""

INTERVAL = 0.002
"""Seconds between two looks at the process's memory."""


@dataclass
class Memory:
    """How much memory a block took at most beyond what was taken before it."""

    mib: float = 0.0
    what: str = "of the process"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """Measure a block: allocated memory of an accelerator that counts it, else the resident memory of the process.

    The latter is looked at every 2 ms, and holds only what the process did not have already.
    """
    result = Memory()
    module: Any = torch.get_device_module(device) if device.type != "cpu" else None
    if hasattr(module, "reset_peak_memory_stats"):  # not MPS, whose memory is that of the process
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
        module: Any = torch.get_device_module(device)
        module.synchronize(*([] if device.type == "mps" else [device]))  # there is only one of those


@dataclass(frozen=True)
class Slope:
    """What gradients promise for a small step uphill, and what the step brings."""

    promised: float
    brought: float

    @property
    def ratio(self) -> float:
        """1 for the right gradients and a small enough step."""
        return self.brought / self.promised if self.promised else math.nan


def slope(reward: Any, x: Float[Tensor, "batch *dims"], prompts: list[str]) -> Slope | None:
    """Compare gradients with respect to samples with central differences; None: the values carry no gradients.

    Of several steps uphill the one that agrees best: right gradients agree with one of them, wrong ones with none.
    """
    x = _away_from_levels(x) if x.ndim == 4 else x.detach().clone()
    wanted = x.clone().requires_grad_()
    with torch.enable_grad():
        values = reward(wanted, list(prompts))
        if not values.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(values.sum(), wanted, allow_unused=True)
    if gradient is None:
        return None
    if not gradient.isfinite().all():
        return Slope(math.nan, math.nan)
    found = []
    for step in _steps(x, gradient):
        with torch.no_grad():
            up, down = (reward(end, list(prompts)).double() for end in (x + step, x - step))
        promised = 2 * float((gradient.double() * step.double()).sum())
        found.append(Slope(promised, float((up - down).sum())))
    return min(found, key=lambda one: abs(one.ratio - 1) if math.isfinite(one.ratio) else math.inf)


def _away_from_levels(images: Tensor) -> Tensor:
    """Pictures with some noise, within [2, 253] levels.

    Rewards may round pictures to 8 bits, also after making them smaller: in a plain area every small step would vanish then. At
    the ends of the range clamping has no one derivative.
    """
    noise = torch.randint(-6, 7, images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return ((images.detach() * (LEVELS - 16) + 8).round() + noise) / LEVELS


def _steps(x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Steps uphill: in pictures one 8-bit level in every number, in one of 100, in one of 300.

    One level everywhere is far for a deep network, as adversarial examples show; for a plain reward all steps will do.
    """
    if x.ndim != 4:
        return [gradient.sign() * 1e-3 * max(float(x.abs().max()), 1e-6)]
    places = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    return [gradient.sign() * (places < share) / LEVELS for share in (1.0, 0.01, 0.003)]


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
