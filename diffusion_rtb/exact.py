"""What a pipeline whose posterior is known can tell about it, for comparisons of samplers with the truth.

A prior that has the method `exact_target(reward, beta)` takes part; nothing else is asked of it, and nothing here knows of any
particular pipeline. What a target cannot give stays None (`as_exact`, `modes`, `log_density`), and then no number is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Prior, Reward

__all__ = ["ExactTarget", "HasExactTarget", "HasLogRatio", "LogRatio", "Modes", "exact_target"]


@dataclass(frozen=True)
class LogRatio:
    """The reward min(max(log f - log g, low), high), by the parameters of the densities f and g as `rewards.density` takes them."""

    density: Mapping[str, Any]
    """Of f."""
    minus: Mapping[str, Any] | None = None
    """Of g; None: log g = 0."""
    low: float | None = None
    high: float | None = None


@runtime_checkable
class HasLogRatio(Protocol):
    """A reward that may be a log-ratio of densities: of such rewards analytic priors know the posterior."""

    def log_ratio(self) -> LogRatio | None:
        """The densities; None: it is made of something else. Asked before weights are loaded."""


@dataclass(frozen=True, eq=False)
class Modes:
    """Separate round regions that a sample can be told to belong to."""

    centres: Float[Tensor, "modes dim"]
    """All modes of the prior, in data units."""
    weights: Float[Tensor, " modes"]
    """Of the exact posterior; sum 1, and 0 for a mode that it does not have."""
    std: float
    """Standard deviation of one mode in every direction, in data units."""


@dataclass(frozen=True, eq=False)
class ExactTarget:
    """The exact posterior p(x)·exp(beta·r(x)) / Z of one prior and one reward, in data units, that is, of decoded vectors."""

    log_z: float
    """log E_p[exp(beta·r(x))]; nats."""
    sample: Callable[[int, torch.Generator], Tensor]
    """(count, generator) -> exact, independent samples (count, dim), float64."""
    as_exact: Callable[[], AbstractContextManager[None]] | None = None
    """Inside this block the prior's network is the exact posterior's own denoiser, run through the same chain and steps.

    Where no denoiser makes the chain exact it is the best one. How far it is from the truth is the error of the chain: training
    cannot do better. None: there is none, as for a learned prior; then the truth is no row of the comparison.
    """
    modes: Modes | None = None
    """Where the posterior is in pieces that can be counted; None: it is not."""
    log_density: Callable[[Tensor], Tensor] | None = None
    """x (batch, dim) -> log p*(x) (batch,), normalised, nats; for contours. None: not known."""


@runtime_checkable
class HasExactTarget(Protocol):
    """A `Prior` that knows its posterior for some rewards."""

    def exact_target(self, reward: Reward, beta: float) -> ExactTarget:
        """The exact posterior; the posterior's correction is attached already.

        Args:
            reward: The reward; its weights need not be loaded. `HasLogRatio` is what it may say about itself.
            beta: Nats per unit of reward.

        Raises:
            ValueError: the posterior of this reward is not known; the message says for which it is.
        """


def exact_target(prior: Prior, reward: Reward, beta: float) -> ExactTarget:
    """The prior's exact posterior.

    Raises:
        ValueError: the prior knows no exact posterior, or none for this reward.
    """
    if not isinstance(prior, HasExactTarget):
        raise ValueError(
            f"The prior {type(prior).__name__} has no exact target: nobody knows its posterior, so no sampler can be compared with "
            "it. `gaussian` and `gmm` have one, and a prior of your own with a method exact_target(reward, beta), see "
            "diffusion_rtb.exact."
        )
    return prior.exact_target(reward, beta)
