"""Which rewards have a posterior that is the prior's mixture with other weights, and that posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from diffusion_rtb.densities import numbers
from diffusion_rtb.exact import ExactTarget, HasLogRatio, Modes
from diffusion_rtb.interfaces import Reward
from pipelines._analytic.mixture import Mixture

__all__ = ["known_posterior", "target_of"]

LOW = -8.0
"""Nats. A reward cut off below this keeps its posterior: the mass that is added, at most exp(-8) = 0.03 %, cannot be measured."""


def known_posterior(prior: Mixture, reward: Reward, beta: float) -> Mixture:
    """f, where the reward is log f - log p with p this prior and f a mixture of its modes, and beta is 1: then log Z = 0.

    A lower bound `low` of the reward is let pass: p·exp(max(r, low)) is f but for a mass of at most exp(low), which is
    also the most that log Z grows by.

    Args:
        prior: p.
        reward: A `LogRatio` of two {means, weights, variance}, with a `low` of -8 or less, if any, and no `high`.
        beta: Nats per unit of reward.

    Raises:
        ValueError: the posterior is another one.
    """
    ratio = reward.log_ratio() if isinstance(reward, HasLogRatio) else None
    if ratio is None or ratio.minus is None:
        raise _unknown(f"the reward {type(reward).__name__} is no ratio of two densities")
    if ratio.high is not None or (ratio.low is not None and ratio.low > LOW):
        raise _unknown(
            f"the reward is clamped to {ratio.low} … {ratio.high}, which moves the posterior (a low of {LOW:g} or less does not)"
        )
    f, g = ratio.density, ratio.minus
    if not ("means" in f and "means" in g):
        raise _unknown("`density` and `minus` are not both mixtures, written {means, weights, variance}")
    if beta != 1:
        raise _unknown(f"beta is {beta:g} instead of 1")
    for name, given in (("density", f), ("minus", g)):
        variance = given.get("variance")
        if not isinstance(variance, int | float) or not math.isclose(variance, prior.variance, rel_tol=1e-9):
            raise _unknown(f"{name}.variance is {variance}, the prior's is {prior.variance:g}")
    subtracted = prior.weighted(_points(g), g.get("weights"))
    if not torch.allclose(subtracted.weights, prior.weights, atol=1e-6):
        raise _unknown("`minus` has other weights than the prior, which it must be")
    return prior.weighted(_points(f), f.get("weights"))


def _points(density: Mapping[str, Any]) -> list[list[float]]:
    points: list[list[float]] = numbers("means", density["means"], 2).tolist()
    return points


def target_of(prior: Mixture, posterior: Mixture, as_exact: Callable[[], AbstractContextManager[None]]) -> ExactTarget:
    """What a comparison asks of a posterior of log Z = 0 with the modes of its prior."""
    modes = Modes(prior.means, posterior.weights, math.sqrt(posterior.variance))
    return ExactTarget(0.0, posterior.sample, as_exact, modes, posterior.log_prob)


def _unknown(why: str) -> ValueError:
    return ValueError(
        f"The posterior of this prior is not known in closed form: {why}. It is known for beta 1 and the reward "
        "{component: density, density: {means: some of the prior's, weights, variance: the prior's}, minus: {the prior's own}}."
    )
