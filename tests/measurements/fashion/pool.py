"""Samples of the prior that all rows share: drawn once, in files, so that the command can be interrupted.

Trajectory k is the k-th that `prior_buffer` would draw in a run of the same seed. The first ones are what runs are trained on, with
the rewards of their class; the others are the row of the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.behaviours._memory import pack, unpack
from diffusion_rtb.behaviours.prior_buffer import prior_trajectories
from diffusion_rtb.files.whole import whole
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["draw_pool", "trained_on", "x_0_of_prior"]

PART = 128
"""Trajectories in one file."""


def draw_pool(sampler: Sampler, folder: Path, seed: int, kept: int, judged: int, say: Callable[[str], None]) -> None:
    """`kept` trajectories whole and the x_0 of `judged` more, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, kept + judged, PART):
        file = folder / f"{start:06d}.safetensors"
        if file.exists():
            continue
        batch = Batch.cat(list(prior_trajectories(sampler, seed, [(0, k) for k in range(start, start + PART)])))
        tensors = pack({0: batch}, {0: start + PART}) if start < kept else {"x_0": batch.trajectory.x_0}
        with whole(file) as unfinished:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, unfinished)
        say(f"prior: {start + PART} of {kept + judged}")


def trained_on(folder: Path, kept: int, reward: Callable[[Tensor], Tensor], noised: bool = False) -> Batch:
    """The whole trajectories, with the rewards of their x_0; what is noised anew has x_0 alone, and so the others' as well."""
    parts = [unpack(load_file(file))[0][0] for file in sorted(folder.glob("*.safetensors")) if int(file.stem) < kept]
    batch = Batch.cat(parts)
    if noised:
        x_0 = torch.cat([batch.trajectory.x_0, x_0_of_prior(folder, kept)])
        batch = batch[torch.arange(len(x_0)) % len(batch)]  # densities are those of others, and nobody reads them
        batch = replace(batch, trajectory=replace(batch.trajectory, x=x_0[:, None]))
    return replace(batch, reward=reward(batch.trajectory.x_0).to(batch.reward))


def x_0_of_prior(folder: Path, kept: int) -> Float[Tensor, "batch 1 32 32"]:
    """The others' x_0."""
    return torch.cat(
        [load_file(file)["x_0"] for file in sorted(folder.glob("*.safetensors")) if int(file.stem) >= kept]
    )
