"""What is asked of the device itself: to be done, how much memory it took, how often the host waited for it, what it is."""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_rtb import __version__

__all__ = [
    "TORCH_DTYPES",
    "counted",
    "describe_machine",
    "peak_memory",
    "precision",
    "settled",
    "shared",
    "timed",
    "typical",
    "waits",
]

TORCH_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def settled(device: torch.device) -> None:
    """Wait until everything that was given to the device is done."""
    module: Any = torch.get_device_module(device)
    module.synchronize(*((device,) if device.type == "cuda" else ()))


def timed(action: Callable[[], object], device: torch.device, *, seconds: float = 3.0, most: int = 5) -> list[float]:
    """Seconds of each of several runs: at least one, at most `most`, no further one once `seconds` have passed."""
    found: list[float] = []
    settled(device)
    while len(found) < most and sum(found) < seconds:
        start = perf_counter()
        action()
        settled(device)
        found.append(perf_counter() - start)
    return found


def typical(seconds: list[float]) -> float:
    """The median: one slow run among several says nothing."""
    return float(median(seconds))


def peak_memory(action: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that were allocated on the device at once while `action` ran, weights included; None on the CPU: not measured."""
    if device.type != "cuda":
        action()
        return None
    settled(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    settled(device)
    return int(torch.cuda.max_memory_allocated(device))


def waits(action: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waited for the device while `action` ran; None on the CPU: not measured.

    Counted by torch.cuda.set_sync_debug_mode, which warns at every call that waits.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def counted(action: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `action`; 2 for a multiplication and its
    addition.
    """
    with FlopCounterMode(display=False) as counter:
        action()
    return int(counter.get_total_flops())


def shared(flop: int, seconds: float, rate: float | None) -> dict[str, float | None]:
    """FLOP/s, and their share of the machine's matrix rate of the same dtype where that was measured."""
    return {"flop_per_second": flop / seconds, "share_of_rate": None if rate is None else flop / seconds / rate}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inside the block float32 is float32, and with "tf32" rounded to 10 bits inside matrix products and convolutions."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What measured: results of another machine, or of other libraries, are not mixed with its own."""
    found: dict[str, Any] = {"device": device.type, "name": _processor(), "cores": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["name"] = properties.name
        found["memory"] = int(properties.total_memory)
        found["driver"], found["cuda"] = _driver(), torch.version.cuda
    else:
        found["memory"] = int(psutil.virtual_memory().total)
    libraries = ("torch", "diffusers", "transformers", "peft")
    return (
        found
        | {"diffusion-rtb": __version__, "python": platform.python_version()}
        | {x: _version(x) for x in libraries}
    )


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return "not installed"


def _processor() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _driver() -> str:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0].strip()
        )
    return "unknown"
