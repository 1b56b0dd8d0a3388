"""What changes with the iteration: learning rates, whose turn it is among the prompts, and which steps get a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from diffusion_rtb.chain.seeds import seed_of

if TYPE_CHECKING:
    from diffusion_rtb.config.sections import TrainConfig

__all__ = ["dealt", "learning_rate_factor", "nth_prompt", "prompt_rows"]


def learning_rate_factor(train: TrainConfig, iteration: int) -> float:
    """Linear warm-up to 1, then the configured decay towards 0 at the last iteration."""
    if iteration < train.warmup:
        return (iteration + 1) / (train.warmup + 1)
    done = (iteration - train.warmup) / max(1, train.iterations - train.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[train.lr_decay]


def nth_prompt(run_seed: int, n: int, total: int) -> int:
    """The n-th prompt of an endless sequence of shuffled passes over the table."""
    return _shuffled(run_seed, n // total, total)[n % total]


def prompt_rows(run_seed: int, iteration: int, count: int, total: int) -> list[int]:
    """The `count` prompts of an iteration: every prompt once before any comes again, and none twice in one iteration.

    Where a pass over the table ends within an iteration, the next pass begins with prompts that are not in it yet.
    """
    number, place = divmod(iteration * count, total)
    order = _pass(run_seed, number, count, total)[place:]
    if len(order) < count:
        order += _pass(run_seed, number + 1, count, total)
    return order[:count]


def _pass(run_seed: int, number: int, count: int, total: int) -> list[int]:
    """One shuffled pass over the table; the prompts of the iteration that it begins in the middle of come last."""
    shuffled = _shuffled(run_seed, number, total)
    before = number * total % count
    if before == 0:
        return shuffled
    just_seen = set(_pass(run_seed, number - 1, count, total)[-before:])
    return [row for row in shuffled if row not in just_seen] + [row for row in shuffled if row in just_seen]


def _shuffled(run_seed: int, number: int, total: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(run_seed, "prompts", number))
    return torch.randperm(total, generator=generator).tolist()


def dealt(dense: Sequence[int], count: int | None, micro_batches: int, seed: int) -> list[list[int]]:
    """Steps for each micro-batch, `count` different ones at random, or all: over the batch each equally often, give or take one."""
    if count is None or count >= len(dense):
        return [list(dense)] * micro_batches
    order = torch.randperm(len(dense), generator=torch.Generator().manual_seed(seed)).tolist()
    places = [[(m * count + k) % len(dense) for k in range(count)] for m in range(micro_batches)]
    return [sorted(dense[order[place]] for place in mine) for mine in places]
