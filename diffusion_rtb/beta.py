"""beta, nats per unit of reward: constant, annealed, or such that the posterior ends up a given number of nats from the prior."""

from __future__ import annotations

import logging
import math
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.beta import BetaConfig

__all__ = ["Annealed", "Beta", "Constant", "KlBudget", "make_beta"]

AHEAD = 4.0
"""How many times what q has realised beta may be before it waits: a q that follows, however slowly, stays below."""

WAITED = 20
"""Iterations in a row that beta has waited when it is said."""

log = logging.getLogger(__name__)


@runtime_checkable
class Beta(Protocol):
    """What the trainer asks of beta; a checkpoint holds `now`, a float."""

    def now(self, iteration: int) -> float:
        """Of the target in this iteration."""

    def trained(self, done: int) -> float:
        """Of the posterior after so many iterations."""

    def settle(self, moments: Float[Tensor, "3"], pace: float) -> dict[str, float]:
        """An iteration has succeeded.

        Args:
            moments: What `realised` said of it: KL, Cov(log_q - log_p, r) and Var(r).
            pace: The iteration's learning rate as a share of the full one, in [0, 1].

        Returns:
            What is logged of it.
        """

    def load(self, beta: float) -> None:
        """Go on from what `now` was when a checkpoint was written."""


def make_beta(config: BetaConfig) -> Beta:
    """What a config asks for."""
    if config.kl_budget is not None:
        return KlBudget(config.value, nats=config.kl_budget.nats, rate=config.kl_budget.rate)
    if config.anneal is not None:
        return Annealed(config.value, start=config.anneal.start, iterations=config.anneal.iterations)
    return Constant(config.value)


class Constant:
    """The same in every iteration."""

    def __init__(self, value: float) -> None:
        self.value = value

    def now(self, iteration: int) -> float:
        return self.value

    def trained(self, done: int) -> float:
        return self.now(max(0, done - 1))

    def settle(self, moments: Float[Tensor, "3"], pace: float) -> dict[str, float]:
        return {}

    def load(self, beta: float) -> None:
        return


class Annealed(Constant):
    """value·(start + (1 - start)·min(1, iteration/iterations)): linear from a fraction of it."""

    def __init__(self, value: float, *, start: float, iterations: int) -> None:
        super().__init__(value)
        self.start = start
        self.iterations = iterations

    def now(self, iteration: int) -> float:
        return self.value * (self.start + (1 - self.start) * min(1.0, iteration / self.iterations))


class KlBudget:
    r"""beta, adapted so that KL(q || p) of the trained chain approaches `nats`.

        error = clip((nats - KL) / nats, -1, 1)
        log beta <- log beta + rate · pace · error · w        w = min(1, b / beta) to go up, min(1, beta / b) to go down

    with b = Cov(log_q - log_p, r) / Var(r), the beta that q has realised so far (`realised`). KL grows with beta, by
    d KL / d log beta = beta²·Var(r) at the posterior, so there is one beta to find, and the sum over iterations finds it without an
    error left, also where q cannot become the posterior. w keeps beta from running ahead of a q that is still learning what
    beta it was given, and pace, the learning rate as a share of its full value, from moving on when q no longer does: without
    them, beta overshoots by as much as q lags.

    A q that cannot go that far, for want of adapters, of a learning rate, or of samples with another reward, stays where it is
    while beta grows. At 4 times b, or 4 times where it started, whichever is more, beta therefore waits, and goes on once q has
    come after; when it has waited for 20 iterations, a warning says what was reached.

    Trust-PCL likewise sets its lambda (alpha = 1/beta here) so that the divergence from the reference policy is a number that one
    chooses, because one knows beforehand what distance is safe and not what a reward is worth in nats; it finds it by a line
    search over returns re-weighted by exp(return / lambda), whose effective sample size is of the order of exp(-KL): fine within a
    trust region, useless at the tens of nats between two image models. The measured KL has no such limit. Once q has reached
    it, beta is constant and the target p(x)·exp(beta·r(x)) / Z.

    Args:
        beta: Where to start; nats per unit of reward.
        nats: The KL to reach.
        rate: Largest change of log beta in one iteration.

    Sources: Nachum et al. 2018, https://arxiv.org/abs/1707.01891; controlling a measured KL by its weight, Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593.
    """

    def __init__(self, beta: float, *, nats: float, rate: float) -> None:
        self.beta = self.start = beta
        self.nats = nats
        self.rate = rate
        self.waiting = 0
        """Iterations in a row that beta has waited for q."""

    def now(self, iteration: int) -> float:
        return self.beta

    def trained(self, done: int) -> float:
        return self.beta

    def load(self, beta: float) -> None:
        self.beta = beta

    def settle(self, moments: Float[Tensor, "3"], pace: float) -> dict[str, float]:
        """Move beta after an iteration; see `Beta`."""
        kl, covariance, variance = moments.tolist()
        realised = covariance / variance if variance > 0 else 0.0
        self._move(kl, max(0.0, realised), pace)
        return {"beta_realised": realised}

    def _move(self, kl: float, b: float, pace: float) -> None:
        error = min(1.0, max(-1.0, (self.nats - kl) / self.nats))
        ahead = error > 0 and AHEAD * max(b, self.start) <= self.beta
        self._wait(ahead, kl, b)
        if ahead:
            return
        if error > 0:
            error *= min(1.0, b / self.beta)
        elif b > 0:
            error *= min(1.0, self.beta / b)
        self.beta *= math.exp(self.rate * pace * error)

    def _wait(self, ahead: bool, kl: float, b: float) -> None:
        """Count, and say so once."""
        self.waiting = self.waiting + 1 if ahead else 0
        if self.waiting == WAITED:
            log.warning(
                "beta.kl_budget: beta stays at %.3g. KL is %.3g of the %.3g nats asked for, and the posterior has realised a "
                "beta of %.2g: so far it goes no further. beta grows again if it does; if not, lower nats to what it reaches, or "
                "give it more rank, iterations or train.lr, or prior trajectories (prior_buffer of behaviours).",
                self.beta,
                kl,
                self.nats,
                b,
            )
