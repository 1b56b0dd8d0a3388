"""Which modes of `gmm25` each loss misses: `python -m tests.measurements.mode_table OUT [ITERATIONS] [OBJECTIVE ...]`.

A reduced problem: 20 steps, 120 iterations, groups of 128, seed 0, so that a run takes seconds; no sampler is near its best.
Trajectories are half the prior's as it is, or all the posterior's own. A mode is missed where it has less than a quarter of its
true share.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from diffusion_rtb.comparison.cell import train_and_measure
from diffusion_rtb.comparison.plan import truth_of
from diffusion_rtb.comparison.truths.truth import Looks
from diffusion_rtb.comparison.variants import cells, load_variants
from pipelines.gmm import MEANS, POSTERIOR

CONFIG = Path(__file__).parents[2] / "configs" / "gmm25.yaml"
SMALL = [
    "prior.steps=20",
    "prior.width=64",
    "prior.layers=2",
    "train.lr=0.015",
    "train.group=128",
    "train.micro_batch=128",
]
OBJECTIVES = ("vargrad", "forward_kl", "jeffreys", "dpo", "dpo_best_worst", "dpo_hard")
BEHAVIOURS = ("prior_half", "on_policy")
ROW = "| `{}` | {} | {:.3f} | {:.2f} | {:.2f} | {} |"


def missed(shares: list[float]) -> str:
    """Centres of the posterior's modes that have less than a quarter of their weight, with it."""
    pairs = zip(MEANS, shares, strict=False)
    found = [f"{mean} ({share / POSTERIOR[mean]:.2f})" for mean, share in pairs if share < POSTERIOR.get(mean, 0) / 4]
    return ", ".join(found) or "none"


def main(out: str, iterations: str = "120", *objectives: str) -> None:
    """Train, measure and print one row after the other; runs that are finished are not trained again."""
    torch.set_num_threads(1)
    overrides = [*SMALL, f"train.iterations={iterations}", f"out={out}", f"name=modes-{iterations}"]
    looks = Looks(samples=10_000, points=1, point_samples=1000)
    sys.stdout.write(
        "| objective | trajectories | TV | ELBO | KL | modes missed (share of their weight) |\n|---|---|---|---|---|---|\n"
    )
    variants = load_variants(CONFIG)
    rows = (
        cell for one in BEHAVIOURS for cell in cells(CONFIG, variants, objectives or OBJECTIVES, [one], 1, overrides)
    )
    for cell in rows:
        result = train_and_measure(cell.config, truth_of(cell.config), looks)
        assert result is not None
        n = result.numbers
        sys.stdout.write(
            ROW.format(cell.objective, cell.behaviour, n["tv"], n["elbo"], n["kl"], missed(n["shares"])) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
