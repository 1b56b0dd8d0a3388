"""What samplers of flows do to data whose velocity is known: the two tables of docs/flows.md.

python -m tests.measurements.flow_sampler_table

A Gaussian by exact recursion, and a mixture by 60,000 samples, each through the schedulers' own `step`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXEulerAncestralRFScheduler
from torch import Tensor

from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from tests.oracles.gaussian_flow import sampled

SAMPLES = 60_000
WEIGHT, MEAN, STD = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.7], [-1.5, 1.0], [0.3, 0.5]))
BETWEEN, BETA, BINS = -0.4, 4.0, 20
"""The reward is 1 on the left mode; V(x_T) = log E[exp(beta·r) | x_T] by bins of x_T."""


def samplers(steps: int) -> Iterator[tuple[str, Any, bool]]:
    """Name, scheduler without its timesteps, and whether it gets its sigmas with the final 0."""
    ours = FlowMatchSDEScheduler
    yield "ODE", FlowMatchEulerDiscreteScheduler(), False
    yield "stock `stochastic_sampling`", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), False
    yield "`LTXEulerAncestralRFScheduler`", LTXEulerAncestralRFScheduler(), True
    yield "marginal, sqrt 2 (default)", ours(), False
    yield "marginal, 1", ours(noise_level=1.0), False
    yield "marginal, 0.7 (Flow-GRPO)", ours(noise_level=0.7), False
    yield "posterior", ours(kernel="posterior"), False
    yield "posterior, 0.5", ours(kernel="posterior", noise_level=0.5), False
    yield "posterior, window: first half", ours(kernel="posterior", window=[0, steps // 2]), False
    yield "marginal, window: first half", ours(window=[0, steps // 2]), False
    yield "marginal, window: second quarter", ours(window=[steps // 4, steps // 2]), False


def with_sigmas(scheduler: Any, steps: int, shift: float, *, zero: bool) -> Any:
    """The scheduler on linspace(1, 1/T, T), shifted."""
    even = np.linspace(1, 1 / steps, steps)
    sigmas = (shift * even / (1 + (shift - 1) * even)).tolist()
    scheduler.set_timesteps(sigmas=[*sigmas, 0.0] if zero else sigmas)
    return scheduler


def velocity(x: Tensor, t: float) -> Tensor:
    """u = E[e - x_0 | x_t] of the mixture."""
    variance = (1 - t) ** 2 * STD**2 + t * t
    offset = x[:, None] - (1 - t) * MEAN
    share = (WEIGHT.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance).softmax(1)
    return (x - (share * (MEAN + (1 - t) * STD**2 / variance * offset)).sum(1)) / t


def chain(scheduler: Any) -> tuple[Tensor, Tensor]:
    """x_T and x_0 of the mixture's samples."""
    x = x_T = torch.randn(SAMPLES, dtype=torch.float64)
    for timestep, t in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=False):
        x = scheduler.step(velocity(x, t), timestep, x, return_dict=False)[0]
    return x_T, x


def data() -> Tensor:
    mode = (torch.rand(SAMPLES) < WEIGHT[1]).long()
    return MEAN[mode] + STD[mode] * torch.randn(SAMPLES, dtype=torch.float64)


def mixture_row(scheduler: Any, reference: Tensor) -> str:
    """W1 to the data, weight of the left mode, correlation, sd and range of V."""
    x_T, x_0 = chain(scheduler)
    w1 = float((x_0.sort()[0] - reference.sort()[0]).abs().mean())
    left = (x_0 < BETWEEN).double()
    place = x_T.argsort().argsort() * BINS // SAMPLES
    v = torch.stack([(BETA * left[place == b]).exp().mean().log() for b in range(BINS)])
    memory = float(torch.corrcoef(torch.stack([x_T, x_0]))[0, 1])
    return f"{w1:.3f} | {float(left.mean()):.3f} | {memory:.2f} | {float(v.std()):.2f} ({float(v.max() - v.min()):.2f})"


def main() -> None:
    """Write both tables as Markdown."""
    write = sys.stdout.write
    settings = [(20, 1.0), (50, 1.0), (20, 3.0), (50, 3.0)]
    columns = " | ".join(f"T = {steps}, shift {shift:g}" for steps, shift in settings)
    write(f"| sampler | {columns} |\n|---|---|---|---|---|\n")
    for row in range(len(list(samplers(20)))):
        cells = []
        for steps, shift in settings:
            name, scheduler, zero = list(samplers(steps))[row]
            found = sampled(with_sigmas(scheduler, steps, shift, zero=zero), 1.0, 0.25)
            cells.append(f"{found.variance / 0.25:.3f}, {abs(found.correlation):.3f}, {found.widest:.2f}")
        write(f"| {name} | {' | '.join(cells)} |\n")
    torch.manual_seed(0)
    reference = data()
    floor = float((data().sort()[0] - reference.sort()[0]).abs().mean())
    below = [0.5 * math.erfc((float(m) - BETWEEN) / float(s) / math.sqrt(2)) for m, s in zip(MEAN, STD, strict=True)]
    weight = float(WEIGHT[0]) * below[0] + float(WEIGHT[1]) * below[1]
    write(f"\nW1 of two sets of the data: {floor:.3f}; their weight below {BETWEEN}: {weight:.3f}.\n\n")
    for steps, shift in settings:
        write(
            f"| T = {steps}, shift {shift:g} | W1 | left mode | corr(x_T, x_0) | V: sd (range) |\n|---|---|---|---|---|\n"
        )
        for name, scheduler, zero in samplers(steps):
            write(f"| {name} | {mixture_row(with_sigmas(scheduler, steps, shift, zero=zero), reference)} |\n")
            sys.stdout.flush()
        write("\n")


if __name__ == "__main__":
    main()
