"""A sheet of the posterior's samples, written during training."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.files.pictures import grid, save_png
from diffusion_rtb.sampling.decoding import decoded
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["write_sheet"]

PROMPTS = 4
"""Rows on a sheet, at most."""


def write_sheet(sampler: Sampler, run_seed: int, count: int, path: Path) -> None:
    """Samples of the posterior as it is now, one row per prompt, at the same noise whenever it is called.

    Args:
        sampler: Holds the posterior and the prompts.
        run_seed: The run's seed.
        count: Samples per prompt.
        path: Of the PNG file.
    """
    rows = list(range(min(PROMPTS, len(sampler.prompts))))
    pairs = [(row, sample) for row in rows for sample in range(count)]
    seeds = [seed_of(run_seed, "grid", row, sample) for row, sample in pairs]
    batch = sampler.from_posterior([row for row, _ in pairs], seeds)
    images = torch.cat([decoded(sampler.prior, batch.trajectory.x_0[chunk]) for chunk in sampler.chunks(len(pairs))])
    rewards = [f"{value:.2f}" for value in batch.reward.tolist()]
    save_png(grid(images, count, captions=rewards, rows=sampler.texts(rows)), path)
