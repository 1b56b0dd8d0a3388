"""Objectives on noised samples, held against the truth of `gmm25`: `python -m tests.measurements.forward_table OUT [ROW ...]`.

A reduced problem: 20 steps, 150 iterations of groups of 128, one seed, so that a run takes seconds; no row is near its best. A
chain of 20 steps is not quite the reversal of the forward process, which costs all rows but `vargrad` something. The rounds of
`orw_cfm_w2` are 10 iterations each, the stages of `tilt_N` 150/N.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.comparison.cell import train_and_measure
from diffusion_rtb.comparison.plan import truth_of
from diffusion_rtb.comparison.truths.truth import Looks
from diffusion_rtb.config.load import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "gmm25.yaml"
ITERATIONS = 150
SMALL: dict[str, Any] = {
    "prior.steps": 20,
    "prior.width": 64,
    "prior.layers": 2,
    "train.lr": 0.01,
    "train.group": 128,
    "train.micro_batch": 128,
    "train.iterations": ITERATIONS,
    "behaviours": [{"component": "on_policy", "measured": 0}],
}
BUFFER = {"component": "prior_buffer", "share": 0.875, "capacity": 4096, "resample": True, "noised": True}
ROWS: dict[str, dict[str, Any]] = {
    "vargrad": {"component": "rtb", "log_z": "vargrad"},
    "value_gradient": {"component": "value_gradient", "warm_up_updates": 2000},
    "reward_weighted": {"component": "reward_weighted"},
    **{f"orw_{w2:g}": {"component": "orw_cfm_w2", "w2": w2, "refresh": 10} for w2 in (0.0, 0.3, 1.0, 3.0)},
    "ram": {"component": "ram"},
    **{f"tilt_{n}": {"component": "ram", "stages": n, "length": ITERATIONS // n} for n in (1, 2, 5, 10)},
    "elbo_vargrad": {"component": "elbo_vargrad"},
    "elbo_vargrad, refresh 25": {"component": "elbo_vargrad", "refresh": 25},
    "nft": {"component": "nft", "kl": 0.0},
    "nft, kl 1": {"component": "nft", "kl": 1.0},
}
ROW = "| `{}` | {:.3f} | {:.2f} | {:.2f} | {:.2f} | {:.0f} |"


def main(out: str, *names: str) -> None:
    """Train, measure and print one row after the other; runs that are finished are not trained again."""
    torch.set_num_threads(1)
    looks = Looks(samples=10_000, points=1, point_samples=1000)
    sys.stdout.write("| objective | TV | ELBO | KL | E[r] | CPU s |\n|---|---|---|---|---|---|\n")
    for name in names or ROWS:
        changed = {**SMALL, "objective": ROWS[name], "out": out, "name": name.replace(", ", "-").replace(" ", "_")}
        if name == "value_gradient":
            changed["behaviours"] = [BUFFER]
        config = load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in changed.items()])
        result = train_and_measure(config, truth_of(config), looks)
        assert result is not None
        n = result.numbers
        sys.stdout.write(ROW.format(name, n["tv"], n["elbo"], n["kl"], n["elbo"] + n["kl"], n["cpu_seconds"]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
