"""How noisy the gradient of few steps is, by the way they are chosen: `python -m tests.measurements.importance_table [ITERATIONS]`.

`gmm25` in small (20 steps, groups of 128, as `forward_table`), after some iterations (default 40) of an objective of noised samples
with train.step_choice importance, so that the running sizes are those of training. Then one batch with noise of its own is held
fixed, and 4 of the 20 steps are drawn anew 200 times for each of its 4 micro-batches:

    random          4 different ones for each micro-batch, whatever the others have
    stratified      over the micro-batches each equally often, give or take one
    importance      by the size of their gradients so far

The variance of the whole gradient, relative to the squared length of that of all 20 steps; in brackets the bias, that of the mean
of the draws, which noise alone makes variance / 200.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.config.load import load_config
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.regression import Regression
from diffusion_rtb.training.updates.step_choice import Chosen, StepChoice, stratified
from tests.measurements.forward_table import BUFFER, CONFIG, ROWS, SMALL
from tests.oracles.behaving import gradient_of

CHOSEN, DRAWS, MICRO = 4, 200, 32
OBJECTIVES = ("reward_weighted", "tilt_5", "elbo_vargrad", "value_gradient")


class AtRandom(StepChoice):
    """Each micro-batch for itself."""

    def chosen(self, dense: Any, count: int | None, micro_batches: int, seed: int) -> list[Chosen]:
        """See the module."""
        return [stratified(dense, count, 1, seed * micro_batches + m)[0] for m in range(micro_batches)]


def trained(name: str, iterations: int, out: str) -> Trainer:
    """After so many iterations."""
    objective: dict[str, Any] = ROWS[name] | ({"length": iterations} if "length" in ROWS[name] else {})
    objective |= {"stages": 1} if "stages" in objective else {}
    objective |= {"warm_up_updates": 500} if name == "value_gradient" else {}
    changed = {**SMALL, "objective": objective, "out": out, "name": name, "train.iterations": iterations}
    changed |= {"train.gradient_steps": CHOSEN, "train.step_choice": "importance", "train.micro_batch": MICRO}
    if name == "value_gradient":
        changed["behaviours"] = [BUFFER]
    trainer = assemble(load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in changed.items()]))
    trainer.fit()
    return trainer


def variances(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """Of each way: variance and squared bias of the gradient, relative to the squared length of that of all steps."""
    updates, sampler = trainer.updates, trainer.sampler
    with updates.drawing():
        parts = trainer.sources.draw(sampler, [0], trainer.iteration, trainer.beta)

    def gradient(count: int | None, seed: int, choice: StepChoice | None) -> Tensor:
        held = Regression(sampler, trainer.objective, trainer.beta, updates._networks(), updates.tilted, None, choice)  # type: ignore[arg-type]
        noised = held._noised(parts, 0)
        object.__setattr__(held, "_noised", lambda parts, seed: noised)
        held.push(parts, count, seed)
        return gradient_of(trainer.prior)

    whole, found = gradient(None, 0, None), {}
    ways = {"random": AtRandom(), "stratified": None, "importance": updates.choice}
    for name, choice in ways.items():
        rows = torch.stack([gradient(CHOSEN, 1000 + seed, choice) for seed in range(DRAWS)])
        scale = float(whole.square().sum())
        bias = float((rows.mean(0) - whole).square().sum()) / scale
        found[name] = (float((rows - rows.mean(0)).square().sum(1).mean()) / scale, bias)
    return found


def main(iterations: str = "40") -> None:
    """Print the table, a row for each objective."""
    torch.set_num_threads(1)
    sys.stdout.write("| objective | random | stratified | importance |\n|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as out:
        for name in OBJECTIVES:
            found = variances(trained(name, int(iterations), out))
            cells = " | ".join(f"{variance:.2f} ({bias:.3f})" for variance, bias in found.values())
            sys.stdout.write(f"| `{name}` | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
