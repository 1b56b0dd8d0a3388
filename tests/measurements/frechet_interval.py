"""Why the Fréchet distance has no bootstrap interval: how often one would hold the estimate, and the truth; a command.

    python -m tests.measurements.frechet_interval

draws two sets of normal numbers, 200 samples of 16, one of them half a standard deviation aside in each number, whose distance is
16·0.5² = 4, and resamples both sets a hundred times; and all of that twenty times. docs/evaluation.md quotes it.
"""

from __future__ import annotations

import sys

import torch

from diffusion_rtb.evaluation.bootstrap import percentile_interval, resampled_counts
from diffusion_rtb.evaluation.metrics.frechet import frechet_distance

SAMPLES, DIM, ASIDE, RESAMPLINGS, REPETITIONS = 200, 16, 0.5, 100, 20


def main() -> None:
    """Print what they hold."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(REPETITIONS):
        x, y = (torch.randn(SAMPLES, DIM, generator=generator) + aside for aside in (0.0, ASIDE))
        counts = [resampled_counts(SAMPLES, RESAMPLINGS, generator) for _ in range(2)]
        replicates = [frechet_distance(x, y, (w, v)) for w, v in zip(*counts, strict=True)]
        found = percentile_interval(frechet_distance(x, y), torch.tensor(replicates).double(), 0.95)
        rows.append((found.mean, found.low, found.high))
    mean, low, high = torch.tensor(rows).T
    truth = DIM * ASIDE**2
    sys.stdout.write(
        f"Truth {truth:g}; mean estimate {mean.mean():.2f}, mean interval [{low.mean():.2f}, {high.mean():.2f}].\n"
        f"Of {REPETITIONS} intervals {int(((low <= mean) & (mean <= high)).sum())} hold their own estimate and "
        f"{int(((low <= truth) & (truth <= high)).sum())} the truth.\n"
    )


if __name__ == "__main__":
    main()
