"""Where preferences lead on `gmm25`, soft labels and hard ones: `python -m tests.measurements.preference_table OUT [ROW ...]`.

A reduced problem: 40 steps, groups of 256, 400 iterations, learning rate falling to 0, deviations doubled until iteration
120, seed 0.
At each mark 10,000 samples of the posterior as it is: TV of its modes' weights, KL to the prior (exact: 1.157), and the strength,
the slope of log q - log p against beta·r, 1 at the posterior. The truth through the same 40 steps has TV 0.037.
What is finished is kept in `preference_table.json`, and not trained again.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.comparison.truths.measure import draw_posterior, measured
from diffusion_rtb.config.load import load_config
from diffusion_rtb.estimates import achieved_strength
from diffusion_rtb.exact import exact_target
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.observers import Observer
from diffusion_rtb.training.trainer import Trainer

CONFIG = Path(__file__).parents[2] / "configs" / "gmm25.yaml"
FOUND = Path(__file__).with_name("preference_table.json")
SMALL = [
    "prior.steps=40",
    "prior.width=64",
    "prior.layers=2",
    "train.lr=0.015",
    "train.group=256",
    "train.micro_batch=256",
    "train.iterations=400",
    "behaviours.on_policy.until=120",
]
ROWS = {
    "rtb": "{component: rtb}",
    "dpo": "{component: dpo}",
    "dpo, slope 0.2": "{component: dpo, slope: 0.2}",
    "dpo, hard": "{component: dpo, labels: hard}",
}
MARKS = (50, 100, 200, 400)


class Marks(Observer):
    """Measures the posterior after some iterations."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rows: list[dict[str, float]] = []

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        if iteration + 1 not in MARKS:
            return
        sampler, beta = self.trainer.sampler, self.trainer.config.beta.value
        target = exact_target(sampler.prior, sampler.reward, beta)
        x, drawn = draw_posterior(sampler.prior, sampler.reward, sampler.prompts, 10_000, 1)
        numbers = measured(x, drawn, target, beta)
        log_q, log_p = drawn.densities
        ratio = (log_q.double() - log_p.double()).sum(1)
        strength, _ = achieved_strength(ratio, drawn.reward.double(), beta, torch.zeros(len(ratio), dtype=torch.long))
        kept = {name: numbers[name] for name in ("tv", "elbo", "kl", "ess")}
        self.rows.append({"iteration": iteration + 1, "strength": strength} | kept)


def trained(out: str, name: str) -> list[dict[str, float]]:
    """What the marks of a row say."""
    overrides = [*SMALL, f"objective={ROWS[name]}", f"out={out}", f"name={name.replace(', ', '-').replace(' ', '-')}"]
    trainer = assemble(load_config(CONFIG, overrides))
    marks = Marks(trainer)
    trainer.observers.insert(0, marks)
    trainer.fit()
    return marks.rows


def main(out: str, *names: str) -> None:
    """Train what is missing, and print the table."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
    for name in names or ROWS:
        if name not in found:
            found[name] = trained(out, name)
            FOUND.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("| objective | TV, strength, KL after 50 | 100 | 200 | 400 |\n|---|---|---|---|---|\n")
    for name in names or ROWS:
        cells = [f"{row['tv']:.3f}, {row['strength']:.2f}, {row['kl']:.2f}" for row in found[name]]
        sys.stdout.write(f"| `{name}` | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
