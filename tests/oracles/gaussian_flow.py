"""Exact moments of flow samplers on Gaussian data: x_T and x_0 of a chain of affine steps are jointly Gaussian, no Monte Carlo.

For data N(m, v) the flow x_t = (1 - t)·x_0 + t·e has E[x_0 | x_t] = m + k·(x_t - (1 - t)·m), k = (1 - t)·v / ((1 - t)²·v + t²).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.chain.scheduler import StepCall, previous_sample

Affine = tuple[float, float, float]
"""A, b and std of x_s = A·x_t + b + std·z."""


@dataclass(frozen=True)
class Moments:
    """Of a chain that starts at x_T ~ N(0, 1)."""

    mean: float
    variance: float
    correlation: float
    """Of x_T and x_0."""
    widest: float
    """The largest ratio of a state's variance to that of the flow at its noise level."""


def x_hat(x: Any, t: float, m: float, v: float) -> Any:
    """E[x_0 | x_t]."""
    return m + (1 - t) * v / ((1 - t) ** 2 * v + t * t) * (x - (1 - t) * m)


def moments(steps: Sequence[Affine], sigmas: Sequence[float], v: float) -> Moments:
    mean, variance, covariance, widest = 0.0, 1.0, 1.0, 0.0
    for (slope, shift, std), s in zip(steps, sigmas[1:], strict=True):
        mean, variance, covariance = slope * mean + shift, slope**2 * variance + std**2, slope * covariance
        widest = max(widest, variance / ((1 - s) ** 2 * v + s * s))
    return Moments(mean, variance, covariance / math.sqrt(variance), widest)


def asked(scheduler: Any, m: float, v: float) -> list[Affine]:
    """The steps of a scheduler whose timesteps are set, from its own `step`: at two states, with z = 0 and with z = 1."""
    found, states = [], torch.tensor([[[[0.0]]], [[[1.0]]]], dtype=torch.float64)
    for timestep, t in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=False):
        velocity: Tensor = (states - x_hat(states, t, m, v)) / t
        call = StepCall(scheduler, scheduler.step, velocity, timestep, states)
        mean = previous_sample(call.mean()).double()
        found.append((float(mean[1] - mean[0]), float(mean[0]), call.std(mean)))
        call.made()
    return found


def sampled(scheduler: Any, m: float, v: float) -> Moments:
    """Moments of the scheduler's own chain."""
    return moments(asked(scheduler, m, v), scheduler.sigmas.tolist(), v)


def schedule(steps: int, shift: float) -> list[float]:
    """linspace(1, 1/T, T), shifted, and 0."""
    even = [1 - i / steps for i in range(steps)]
    return [*(shift * t / (1 + (shift - 1) * t) for t in even), 0.0]


def marginal(t: float, s: float, level: float, m: float, v: float) -> Affine:
    """x + [u + sigma²/(2t)·ê]·(s - t) + sigma·sqrt(t - s)·z, from two values of it."""
    sigma = level * math.sqrt(t / max(1 - t, t - s))

    def mean(x: float) -> float:
        u = (x - x_hat(x, t, m, v)) / t
        return x + (u + sigma**2 / (2 * t) * (x + (1 - t) * u)) * (s - t)

    return mean(1.0) - mean(0.0), mean(0.0), sigma * math.sqrt(t - s)


def posterior(t: float, s: float, level: float, m: float, v: float) -> Affine:
    """By Bayes: x_s | x_0 ~ N((1 - s)·x_0, s²), then x_t | x_s ~ N(r·x_s, t² - r²·s²) with r = (1 - t)/(1 - s); x_0 is x̂."""
    r = (1 - t) / (1 - s)
    forward = t * t - (r * s) ** 2
    std = level / math.sqrt(1 / s**2 + r**2 / forward)

    def mean(x: float) -> float:
        x_0 = x_hat(x, t, m, v)
        return (1 - s) * x_0 + math.sqrt(max(0.0, s * s - std * std)) * (x - (1 - t) * x_0) / t

    return mean(1.0) - mean(0.0), mean(0.0), std


def computed(kernel: Callable[..., Affine], level: float, sigmas: Sequence[float], m: float, v: float) -> Moments:
    """Moments by the formulas; the last step is x̂."""
    pairs = list(itertools.pairwise(sigmas))
    steps = [kernel(t, s, level, m, v) for t, s in pairs[:-1]]
    last = pairs[-1][0]
    constant = x_hat(0.0, last, m, v)
    return moments([*steps, (x_hat(1.0, last, m, v) - constant, constant, 0.0)], sigmas, v)
