"""The gradient of one update, whatever kind of objective it is: of trajectories, or of states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.sections import RunConfig
from diffusion_rtb.interfaces import AimsStates, Loss, Objective, Terms
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.metrics import check_parity, parity
from diffusion_rtb.training.updates.gradient import loss_of, push_back, some_steps, terms_of
from diffusion_rtb.training.updates.regression import Regression

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Updates"]

Update = tuple[dict[str, Batch], Loss, list[Float[Tensor, "_ steps"]]]
"""Parts of a batch with what had to be scored, what the objective says of them, and log_q as the gradient pass saw it."""


@dataclass(frozen=True, eq=False)
class Updates:
    """The objective's gradient into the posterior's parameters; what is wrong is refused before it reaches them.

    Args:
        config: Of the run.
        sampler: Whose posterior it is.
        objective: Of trajectories, or of states (`AimsStates`).
        own: Name of the part that is the posterior's own.
        tilted: Names of the parts whose states were noised from samples of the posterior.
    """

    config: RunConfig
    sampler: Sampler
    objective: Objective
    own: str
    tilted: frozenset[str] = frozenset()

    @staticmethod
    def of(config: RunConfig, sampler: Sampler, objective: Objective, mixture: Mixture) -> Updates:
        """Those of a run."""
        tilted = frozenset(name for name, (source, _) in mixture.items() if source.tilted)
        return Updates(config, sampler, objective, mixture.on_policy.name, tilted)

    def gradient(self, parts: Mapping[str, Batch], beta: float, iteration: int, update: int) -> Update:
        """That of one update on the batch of an iteration."""
        if isinstance(self.objective, AimsStates):
            return self._of_states(parts, self.objective, beta, iteration, update)
        scored = self._scored(parts, update)
        terms, loss = loss_of(self.sampler, self.objective, list(scored.values()), beta)
        return scored, loss, self.backward(list(scored.values()), terms, iteration, update)

    def _of_states(
        self, parts: Mapping[str, Batch], aims: AimsStates, beta: float, iteration: int, update: int
    ) -> Update:
        """The posterior's own trajectories are scored once, to be looked at, and no others."""
        scored = dict(parts)
        if update == 0:
            scored[self.own] = self.sampler.completed(parts[self.own])
        own, train = scored[self.own], self.config.train
        assert own.log_q is not None
        with torch.no_grad(), self.sampler.stopwatch("objective"):
            measured = self.objective(terms_of(self.sampler, own), beta)
        regression = Regression(self.sampler, aims, beta, self.tilted, train.step_weights)
        loss = regression.push(scored, train.gradient_steps, seed_of(self.config.seed, "states", iteration, update))
        return scored, replace(measured, loss=torch.tensor(loss)), [torch.zeros_like(own.log_q)]

    def _scored(self, parts: Mapping[str, Batch], update: int) -> dict[str, Batch]:
        """With both log-densities; after an update the posterior has moved."""
        if update > 0:
            parts = {name: replace(part, log_q=None, kl=None, norm_q=None) for name, part in parts.items()}
        with_kl = ObjectiveTraits.of(self.objective).uses_kl
        complete = self.sampler.with_kl if with_kl else self.sampler.completed
        return {name: complete(part) for name, part in parts.items()}

    def backward(
        self, parts: Sequence[Batch], terms: Terms, iteration: int, update: int
    ) -> list[Float[Tensor, "_ steps"]]:
        """Push what is in `terms` after `loss_of` through the network; log_q of each part as it was replayed."""
        train = self.config.train
        assert terms.log_q.grad is not None
        seed = seed_of(self.config.seed, "steps", iteration, update)
        steps = some_steps(parts[0], train.gradient_steps, seed)
        kl_cotangent = None if terms.kl is None else terms.kl.grad
        replayed = push_back(
            self.sampler, parts, terms.log_q.grad, kl_cotangent, weights=train.step_weights, steps=steps
        )
        if update == 0:
            assert parts[0].log_q is not None
            check_parity(parity(parts[0].log_q, replayed[0]), train.parity_tolerance, iteration)
        return replayed
