"""One seed per (run, iteration, prompt, sample), so that no result depends on batch order or on what ran before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch

__all__ = ["generators", "global_seed", "seed_of"]


def seed_of(run_seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (BLAKE2b of their text)."""
    text = "/".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per trajectory: the same noise on every device and in every batch composition."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it.

    Some schedulers (FlowMatchEuler with `stochastic_sampling`) ignore the pipeline's generators and draw from the global one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
