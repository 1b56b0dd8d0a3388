"""Stored trajectories by prompt row, as tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.sampling.batch import Batch

__all__ = [
    "Memory",
    "counted",
    "pack",
    "rank_weights",
    "record_numbers",
    "stored",
    "unpack",
    "with_newest",
]

Memory = dict[int, Batch]
"""The stored trajectories of each prompt row, oldest first, on the host, with log_p; never changed in place."""


def with_newest(memory: Memory, row: int, new: Batch, capacity: int) -> Batch:
    """What is stored of a row once `new` is: the last `capacity` trajectories."""
    held = Batch.cat([memory[row], new]) if row in memory else new
    return held[max(0, len(held) - capacity) :]


def stored(batch: Batch) -> Batch:
    """What is worth keeping: what the posterior of the moment thought of a trajectory is not."""
    alone = replace(batch.trajectory, output_norm=None)
    return replace(batch, trajectory=alone, log_q=None, mean_p=None, kl=None, norm_q=None, norm_p=None)


def record_numbers(counts: Mapping[int, int], added: Mapping[int, int]) -> Int[Tensor, "n 2"]:
    """Prompt row and number of each stored record, row after row: the newest `counts` of all that were ever `added`."""
    return torch.tensor([[row, added[row] - n + k] for row, n in sorted(counts.items()) for k in range(n)])


def counted(records: Int[Tensor, "n 2"]) -> dict[int, int]:
    """How many records were ever added of each row."""
    return {row: number + 1 for row, number in records.tolist()}


def pack(memory: Memory, added: Mapping[int, int]) -> dict[str, Tensor]:
    """A memory as named tensors, of the form that `run/memories.py` writes; `added` is how many each row was ever given."""
    if not memory:
        return {}
    held = Batch.cat([memory[row] for row in sorted(memory)])
    trajectory = held.trajectory
    fields = {"x": trajectory.x, "log_prob": trajectory.log_prob, "reward": held.reward}
    fields |= {} if held.log_p is None else {"log_p": held.log_p}
    fields["log_behaviour"] = trajectory.drawn_with
    schedule = {"timesteps": trajectory.timesteps, "std": trajectory.std}
    records = record_numbers({row: len(each) for row, each in memory.items()}, added)
    return {"records": records} | {f"record.{name}": tensor for name, tensor in fields.items()} | schedule


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Memory, dict[int, int]]:
    """What `pack` was given; every trajectory with the density it was drawn with."""
    if not tensors:
        return {}, {}
    x, log_prob, reward, log_behaviour = (
        tensors[f"record.{name}"] for name in ("x", "log_prob", "reward", "log_behaviour")
    )
    trajectory = Trajectory(x, tensors["timesteps"], tensors["std"], log_prob, log_behaviour)
    held = Batch(trajectory, tensors["records"][:, 0], reward, log_p=tensors.get("record.log_p"))
    added = counted(tensors["records"])
    return {row: held[(held.prompt == row).nonzero().flatten()] for row in added}, added


RANK = 0.01
"""k below: the best one in a hundred share the highest weights."""


def rank_weights(reward: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 / (k·n + rank), rank 0 for the highest reward: the same whatever the scale of the reward, and never 0.

    With k = 0.01 the best tenth of a full buffer gets half of the draws.

    Sources: Tripp, Daxberger, Hernández-Lobato 2020, https://arxiv.org/abs/2006.09191; in the replay buffers of diffusion
    samplers, Sendera et al. 2024, https://arxiv.org/abs/2402.05098, and their code.
    """
    n = len(reward)
    rank = torch.empty(n, dtype=torch.float64)
    order = torch.argsort(reward.cpu(), descending=True, stable=True)
    rank[order] = torch.arange(n, dtype=torch.float64)
    return 1 / (RANK * n + rank)
