"""What changes with the iteration: learning rates, and whose turn it is among the prompts."""

from __future__ import annotations

import math

import torch

from diffusion_rtb.config import TrainConfig
from diffusion_rtb.seeds import seed_of

__all__ = ["learning_rate_factor", "nth_prompt"]


def learning_rate_factor(train: TrainConfig, iteration: int) -> float:
    """Linear warm-up to 1, then the configured decay towards 0 at the last iteration."""
    if iteration < train.warmup:
        return (iteration + 1) / (train.warmup + 1)
    done = (iteration - train.warmup) / max(1, train.iterations - train.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[train.lr_decay]


def nth_prompt(run_seed: int, n: int, total: int) -> int:
    """The n-th prompt of an endless sequence of shuffled passes over the table."""
    generator = torch.Generator().manual_seed(seed_of(run_seed, "prompts", n // total))
    return int(torch.randperm(total, generator=generator)[n % total])
