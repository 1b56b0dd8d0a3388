"""2-D data sets with a linear reward, held against the exact posterior: `python -m tests.measurements.toys_table OUT [TOY ...]`.

The toys of BDPO (2025, https://arxiv.org/abs/2502.04778) and of many others before: eight Gaussians on a circle, two moons, a Swiss
roll. Each is a mixture of narrow round Gaussians, for curves many along them, so that prior, denoiser and posterior are exact: by
exp(beta·a·x) a component of weight w, mean m and variance v becomes one of weight w·exp(beta·a·m + beta²·|a|²·v/2) and mean m +
beta·v·a. 20 steps, 150 iterations of groups of 128, seed 0, one learning rate, none tuned.

TV is between shares of the components (each sample counts for the nearest one; of curves stretches of 6 together) of 10,000 samples
and of 100,000 exact ones; that of 10,000 exact ones is the noise. "start": the prior's own samples.
"""

from __future__ import annotations

import json
import logging
import math
import sys

import torch
from torch import Tensor

from diffusion_rtb.config.load import load_config
from diffusion_rtb.estimates import elbo, total_variation
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from tests.measurements.forward_table import CONFIG, SMALL

COUNT, EXACT = 10_000, 100_000
SLOPE, BETA = torch.tensor([0.3, 0.6], dtype=torch.float64), 1.0


def circle(angles: Tensor, radius: float | Tensor) -> Tensor:
    """Points (n, 2)."""
    return torch.stack([radius * angles.cos(), radius * angles.sin()], 1)


HALF = torch.linspace(0, math.pi, 24, dtype=torch.float64)
ROLL = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 48, dtype=torch.float64)
MOONS = torch.cat([circle(HALF, 1.0), torch.tensor([1.0, 0.5]) - circle(HALF, 1.0)])
TOYS: dict[str, tuple[Tensor, float, int]] = {
    "8gaussians": (circle(torch.arange(8, dtype=torch.float64) * math.pi / 4, 4.0), 0.1, 1),
    "moons": (3 * (MOONS - MOONS.mean(0)), 0.04, 6),
    "swissroll": (circle(ROLL, 0.3 * ROLL), 0.04, 6),
}
"""Means, variance, and how many neighbours count as one."""
OBJECTIVES = {
    "rtb": {"component": "rtb", "log_z": "vargrad"},
    "value_gradient": {"component": "value_gradient", "warm_up_updates": 1000},
}


class Truth:
    """The posterior of a toy."""

    def __init__(self, toy: str) -> None:
        self.means, self.variance, self.together = TOYS[toy]
        log_w = BETA * self.means @ SLOPE + BETA**2 * float(SLOPE.square().sum()) * self.variance / 2
        self.log_z = float(log_w.logsumexp(0)) - math.log(len(log_w))
        self.weights = log_w.softmax(0)
        self.moved = self.means + BETA * self.variance * SLOPE
        self.reward = float(self.weights @ (self.moved @ SLOPE))

    def sample(self, count: int, seed: int) -> Tensor:
        """Exact samples."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
        return self.moved[k] + self.variance**0.5 * noise

    def shares(self, x: Tensor) -> Tensor:
        """Of stretches."""
        nearest = torch.cdist(x.double(), self.means).argmin(1) // self.together
        return torch.bincount(nearest, minlength=len(self.means) // self.together).double() / len(x)

    def distance(self, x: Tensor) -> float:
        """TV to exact samples."""
        return total_variation(self.shares(x), self.shares(self.sample(EXACT, 1)))


def trained(toy: str, name: str, out: str) -> Trainer:
    """A run of the same budget of iterations."""
    means, variance, _ = TOYS[toy]
    prior = {"component": "gmm", "means": means.tolist(), "variance": variance}
    changed = {
        **{"prior": prior, "reward": {"component": "density", "density": {"linear": SLOPE.tolist()}}, "beta": BETA},
        **{"objective": OBJECTIVES[name], "out": out, "name": f"{toy}-{name}"},
        **SMALL,
        "behaviours": [],
    }
    trainer = assemble(load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in changed.items()]))
    trainer.fit()
    return trainer


def drawn(trainer: Trainer, *, of_prior: bool = False) -> Batch:
    """COUNT samples, in pieces."""
    parts = [
        trainer.sampler.draw([0] * 2000, range(k, k + 2000), of_prior=of_prior, images=True)
        for k in range(0, COUNT, 2000)
    ]
    return Batch.cat(parts)


def main(out: str, *toys: str) -> None:
    """Print a row for each toy and objective."""
    torch.set_num_threads(1)
    sys.stdout.write(
        "| toy | objective | TV | noise | start | E[r], exact | log Z - ELBO | KL |\n|---|---|---|---|---|---|---|---|\n"
    )
    for toy in toys or TOYS:
        truth = Truth(toy)
        noise = truth.distance(truth.sample(COUNT, 2))
        for name in OBJECTIVES:
            trainer = trained(toy, name, out)
            trainer.sampler.micro_batch = 2000
            before, after = drawn(trainer, of_prior=True), trainer.sampler.completed(drawn(trainer))
            assert before.images is not None
            assert after.images is not None
            assert after.log_q is not None
            assert after.log_p is not None
            ratio = (after.log_q - after.log_p).sum(1)
            gap = truth.log_z - elbo(BETA * after.reward.double() - ratio)
            numbers = (truth.distance(after.images), noise, truth.distance(before.images))
            cells = [f"{number:.3f}" for number in numbers]
            cells += [
                f"{float(after.reward.mean()):.2f}, {truth.reward:.2f}",
                f"{gap:.2f}",
                f"{float(ratio.mean()):.2f}",
            ]
            sys.stdout.write(f"| {toy} | `{name}` | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
