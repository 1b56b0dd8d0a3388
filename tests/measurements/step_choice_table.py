"""Which steps get a gradient: its variance with 8 of 50, `python -m tests.measurements.step_choice_table [SAMPLES]`.

RTB with VarGrad on the bundled emoji prior in 50 steps, at the start of training, one group of one prompt (default 16 samples).
The gradient of each step is taken once, by replay; the variance of an estimate from 8 steps of this batch then is exact:

    uniform         8 different ones at random, as `train.gradient_steps` draws them
    stratified      one of each of 8 stretches of 6 or 7 steps
    importance      8 with probabilities in proportion to the length of their gradients, which nobody knows beforehand

Relative to the squared length of the whole gradient; beside it what the batch itself leaves, from the difference of its halves.
"""

from __future__ import annotations

import logging
import sys

import torch
from torch import Tensor

from diffusion_rtb.config.components import build
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.updates.gradient import loss_of, push_back
from tests.oracles.behaving import gradient_of

STEPS, CHOSEN, MICRO = 50, 8, 8
PRIOR = {"component": "stable_diffusion", "path": "emoji", "steps": STEPS, "guidance": 1.0, "tilted_prior": "unguided"}
POSTERIOR = {"rank": 4, "alpha": 4.0, "target_modules": ["time_emb_proj", "attn1.to_v"]}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
REWARD = {
    "component": "classifier",
    "target": "an emoji, on a blue background",
    "classes": [f"an emoji, on a {colour} background" for colour in COLOURS],
}


def step_gradients(sampler: Sampler, count: int) -> Tensor:
    """(halves, steps, numbers): the gradient of each step, from each half of one batch."""
    batch = sampler.completed(sampler.draw([0] * count, list(range(count))))
    objective, half = RTB("vargrad"), count // 2
    found = []
    for part in (batch[:half], batch[half:]):
        terms, _ = loss_of(sampler, objective, [part], 2.0)
        assert terms.log_q.grad is not None
        rows, dense = [], part.trajectory.stochastic.nonzero().flatten().tolist()
        for step in dense:
            push_back(sampler, [part], terms.log_q.grad, steps=[step])  # as one of all: that many times its gradient
            rows.append(gradient_of(sampler.prior) / len(dense))
        found.append(torch.stack(rows))
    return torch.stack(found)


def uniform(g: Tensor, n: int) -> float:
    """E|N/n · sum of n different - sum of all|²."""
    count = len(g)
    spread = float((g - g.mean(0)).square().sum()) / (count - 1)
    return count**2 / n * (1 - n / count) * spread


def stratified(g: Tensor, n: int) -> float:
    """The same with one of each of n stretches, by its length."""
    return sum(len(part) * float((part - part.mean(0)).square().sum()) for part in torch.tensor_split(g, n))


def importance(g: Tensor, n: int) -> float:
    """The same with n drawn in proportion to their lengths, one by one."""
    return (float(g.norm(dim=1).sum()) ** 2 - float(g.sum(0).square().sum())) / n


def main(samples: str = "16") -> None:
    """Print the table."""
    torch.set_num_threads(1)
    prior, reward = build(PRIOR, "prior"), build(REWARD, "reward")
    prior.attach(**POSTERIOR)
    halves = step_gradients(Sampler(prior, reward, ["a cat emoji"], MICRO), int(samples)).double()
    g = halves.mean(0)
    whole = float(g.sum(0).square().sum())
    left = float((halves[0] - halves[1]).sum(0).square().sum()) / 4
    sys.stdout.write("| 8 of 50 steps | variance / |gradient|² |\n|---|---|\n")
    for name, variance in (("uniform", uniform), ("stratified", stratified), ("importance", importance)):
        sys.stdout.write(f"| {name} | {variance(g, CHOSEN) / whole:.2f} |\n")
    sys.stdout.write(f"| all steps: the batch's own | {left / whole:.2f} |\n")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
