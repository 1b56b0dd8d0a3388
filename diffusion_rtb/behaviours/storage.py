"""Stored trajectories by prompt row, as tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_rtb.actor import Experience
from diffusion_rtb.trajectory import Trajectory

__all__ = ["Memory", "pack", "stored", "unpack", "with_newest"]

Memory = dict[int, Experience]
"""The stored trajectories of each prompt row, oldest first, on the CPU, with log_p; never changed in place."""


def with_newest(memory: Memory, row: int, new: Experience, capacity: int) -> Experience:
    """What is stored of a row once `new` is: the last `capacity` trajectories."""
    held = Experience.cat([memory[row], new]) if row in memory else new
    return held[max(0, len(held) - capacity) :]


def stored(experience: Experience) -> Experience:
    """What is worth keeping: what the posterior of the moment thought of a trajectory is not."""
    return replace(experience, log_q=None, mean_p=None, kl=None).to("cpu")


def pack(memory: Memory) -> dict[str, Tensor]:
    """A memory as named tensors; empty if it is."""
    if not memory:
        return {}
    held = Experience.cat([memory[row] for row in sorted(memory)])
    assert held.log_p is not None
    trajectory = {f"trajectory.{name}": tensor for name, tensor in held.trajectory.tensors().items()}
    return trajectory | {"prompt": held.prompt, "reward": held.reward, "log_p": held.log_p}


def unpack(tensors: Mapping[str, Tensor]) -> Memory:
    """What `pack` was given."""
    if not tensors:
        return {}
    fields = {name.removeprefix("trajectory."): t for name, t in tensors.items() if name.startswith("trajectory.")}
    held = Experience(
        trajectory=Trajectory(**fields), prompt=tensors["prompt"], reward=tensors["reward"], log_p=tensors["log_p"]
    )
    rows = torch.unique(held.prompt).tolist()
    return {row: held[(held.prompt == row).nonzero().flatten()] for row in rows}
