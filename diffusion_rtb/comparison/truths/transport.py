"""2-Wasserstein distance of samples to exact samples, by optimal transport between equally many points."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of

__all__ = ["BLOCK", "Distance", "block_distances", "check_transport", "floor", "wasserstein"]

BLOCK = 2000
"""Points on each side of one transport problem."""

Exact = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> exact samples (count, dim)."""


def check_transport() -> None:
    """Refuse where the package for optimal transport is missing; ValueError."""
    if importlib.util.find_spec("ot") is None:
        raise ValueError(
            "W2 needs the package POT, which is not installed: pip install 'diffusion-rtb[compare]', or pip install POT."
        )


def wasserstein(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> float:
    r"""W2 = sqrt( min over couplings of E|x - y|² ) of two empirical distributions, exact; in units of x."""
    import ot

    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    # The default number of pivots ends before the optimum at 2,000 points.
    return math.sqrt(max(0.0, float(ot.emd2([], [], cost, numItermax=10_000_000))))


@dataclass(frozen=True)
class Distance:
    """A mean over blocks."""

    mean: float
    standard_error: float | None
    """None for a single block."""


def block_distances(x: Float[Tensor, "batch dim"], exact: Exact, seed: int = 0) -> Distance:
    """Mean W2 between blocks of 2,000 of the samples and as many exact ones each; a rest that fills no block is left out.

    Fewer samples than one block are one smaller block. The exact samples depend on `seed` alone, so all samplers meet the same.
    Between finite samples W2 is above 0 also for the truth, and varies: compare with `floor`, over many blocks.

    Raises:
        ValueError: there are no samples.
    """
    if len(x) == 0:
        raise ValueError("W2 needs at least one sample, got none.")
    size = min(BLOCK, len(x))
    found = torch.tensor(
        [
            wasserstein(part, exact(size, torch.Generator().manual_seed(seed_of(seed, "exact", i))))
            for i, part in enumerate(x.split(size))
            if len(part) == size
        ],
        dtype=torch.float64,
    )
    error = float(found.std() / math.sqrt(len(found))) if len(found) > 1 else None
    return Distance(float(found.mean()), error)


def floor(count: int, exact: Exact, seed: int = 0) -> Distance:
    """`block_distances` of `count` exact samples: what a perfect sampler gets."""
    return block_distances(exact(count, torch.Generator().manual_seed(seed_of(seed, "floor"))), exact, seed)
