"""How much memory there is where a run computes, and how much of it is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.process_state import accelerator

__all__ = ["Room", "expected_device", "room_of"]


@dataclass(frozen=True)
class Room:
    """Bytes of memory."""

    device: str
    free: int
    """What this process has taken already included."""
    total: int


def room_of(device: torch.device, taken: int = 0) -> Room:
    """The memory of a device; that of the host for one that does not say.

    Args:
        device: Of the prior's network.
        taken: Bytes of the host's memory that this run takes by now; what it takes of an accelerator is known.
    """
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return Room(str(device), int(free) + int(module.memory_reserved(device)), int(total))
    memory = psutil.virtual_memory()
    return Room(str(device), int(memory.available) + taken, int(memory.total))


def expected_device(config: RunConfig) -> torch.device:
    """Where a prior's network will be that is not loaded: what the config says, or the accelerator, or the CPU."""
    said = (config.prior.model_extra or {}).get("device")
    return torch.device(said) if said else accelerator() or torch.device("cpu")
