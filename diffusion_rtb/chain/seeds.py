"""One seed per (run, iteration, prompt, sample), so that no result depends on batch order or on what ran before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["generators", "global_seed", "seed_of", "trajectory_noise"]


def seed_of(run_seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (BLAKE2b of their text)."""
    text = "/".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per trajectory: the same noise on every device and in every batch composition."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def trajectory_noise(
    generators: Sequence[torch.Generator],
    steps: int,
    dims: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "steps_and_one batch *dims"]:
    """Standard normal noise for whole trajectories, each from its own generator, whatever its batch.

        noise = trajectory_noise(generators, T, dims)         noise[0] is for x_T, noise[i + 1] for the i-th step's variance_noise

    One call of `torch.randn` per trajectory: one per trajectory and step takes longer than a small network does. They are not the
    numbers that those would be: `torch.randn` gives others for other sizes.

    Args:
        generators: One per trajectory, (batch,).
        steps: T.
        dims: Shape of one state.
        dtype: Of the noise.
        device: Where it goes after it is drawn on the generators' device; None: it stays there.
    """
    if not generators:
        return torch.zeros(steps + 1, 0, *dims, dtype=dtype, device=device)
    size = (steps + 1, *dims)
    drawn = [torch.randn(size, generator=g, dtype=dtype, device=g.device) for g in generators]
    return torch.stack(drawn, dim=1).to(device or drawn[0].device)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it.

    Some schedulers (FlowMatchEuler with `stochastic_sampling`) ignore the pipeline's generators and draw from the global one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
