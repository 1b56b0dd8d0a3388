"""The gradient of one update, whatever kind of objective it is: of trajectories, or of states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.sections import RunConfig
from diffusion_rtb.interfaces import AimsStates, FollowsReward, KeepsOld, Loss, Objective, ReadsAdjoint, Terms
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.copies import Copy
from diffusion_rtb.training.metrics import check_parity, parity
from diffusion_rtb.training.updates.adjoint import with_adjoint
from diffusion_rtb.training.updates.estimates import with_estimates
from diffusion_rtb.training.updates.gradient import loss_of, push_back, some_steps, terms_of
from diffusion_rtb.training.updates.pathwise import Pathwise
from diffusion_rtb.training.updates.regression import Regression
from diffusion_rtb.training.updates.states import Networks
from diffusion_rtb.training.updates.step_choice import StepChoice

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Update", "Updates"]


@dataclass(frozen=True, eq=False)
class Update:
    """What the gradient of an update came by."""

    parts: dict[str, Batch]
    """Of the batch, with what had to be scored."""
    shown: dict[str, Batch]
    """The same for the log, the posterior's own trajectories with log_q."""
    loss: Loss | None
    """What the objective says of them; None where there is nothing to say: after the first update on states, or without density."""
    replayed: list[Float[Tensor, "_ steps"]]
    """log_q as the gradient pass saw it, of each part; 0 where it saw none."""
    value: float
    """Of the loss; that of states in nats."""


@dataclass(frozen=True, eq=False)
class Updates:
    """The objective's gradient into the posterior's parameters; what is wrong is refused before it reaches them.

    Args:
        config: Of the run.
        sampler: Whose posterior it is.
        objective: Of trajectories, or of states (`AimsStates`).
        own: Name of the part that is the posterior's own.
        tilted: Names of the parts whose states were noised from samples of the posterior.
        old: The older posterior of an objective that keeps one.
        choice: Of the steps, where it follows their gradients (`train.step_choice`).
    """

    config: RunConfig
    sampler: Sampler
    objective: Objective
    own: str
    tilted: frozenset[str] = frozenset()
    old: Copy | None = None
    choice: StepChoice | None = None

    @staticmethod
    def of(config: RunConfig, sampler: Sampler, objective: Objective, mixture: Mixture) -> Updates:
        """Those of a run, whose posterior is attached."""
        tilted = frozenset(name for name, (source, _) in mixture.items() if source.tilted)
        old = Copy(sampler.prior) if ObjectiveTraits.of(objective).keeps_old else None
        choice = StepChoice() if config.train.step_choice == "importance" else None
        return Updates(config, sampler, objective, mixture.on_policy.name, tilted, old, choice)

    # The older posterior

    @property
    def draws_old(self) -> bool:
        """The samples of an iteration are the older posterior's."""
        return self.old is not None and ObjectiveTraits.of(self.objective).draws_old

    def measures(self, iteration: int) -> bool:
        """The posterior's own trajectories of this iteration are scored for the log."""
        return iteration % self.config.train.measure_every == 0

    def drawing(self) -> AbstractContextManager[None]:
        """The block in which they are drawn."""
        return self.old.worn() if self.old is not None and self.draws_old else nullcontext()

    def settle(self, iteration: int) -> None:
        """Let the older posterior go after the posterior, once the iteration's updates are done."""
        if self.old is not None and isinstance(self.objective, KeepsOld):
            self.old.move(self.objective.keeps_old(iteration))

    # Gradients

    def gradient(
        self, parts: Mapping[str, Batch], beta: float, iteration: int, update: int, own: Batch | None = None
    ) -> Update:
        """That of one update on the batch of an iteration; `own` are the posterior's trajectories where `parts` has none."""
        if isinstance(self.objective, AimsStates):
            return self._of_states(parts, self.objective, beta, iteration, update, own)
        if isinstance(self.objective, FollowsReward):
            return self._of_reward(parts, self.objective, beta, iteration, update)
        scored = self._scored(parts, update)
        terms, loss = loss_of(self.sampler, self.objective, list(scored.values()), beta)
        replayed = self.backward(list(scored.values()), terms, iteration, update)
        return Update(scored, scored, loss, replayed, float(loss.loss.detach()))

    def _of_states(
        self,
        parts: Mapping[str, Batch],
        aims: AimsStates,
        beta: float,
        iteration: int,
        update: int,
        own: Batch | None,
    ) -> Update:
        """The posterior's own trajectories are scored once, to be looked at, and no others; none where nobody looks."""
        scored, shown, measured = dict(parts), dict(parts), None
        if update == 0 and self.measures(iteration) and (own is not None or not self.draws_old):
            looked_at = parts[self.own] if own is None else own
            shown[self.own] = self.sampler.completed(looked_at, means=own is None and self._learns_states_of_chain)
            scored[self.own] = shown[self.own] if own is None else scored[self.own]
            measured = self._measured(shown[self.own], beta) if self._comparable(shown[self.own]) else None
        if isinstance(self.objective, ReadsAdjoint):
            scored = {name: self._led(part, self.objective, beta) for name, part in scored.items()}
        train = self.config.train
        regression = Regression(
            self.sampler, aims, beta, self._networks(), self.tilted, train.step_weights, self.choice
        )
        leaves = ObjectiveTraits.of(self.objective).leaves_own
        learned = {name: part for name, part in scored.items() if not (leaves and name == self.own)}
        loss = regression.push(learned, train.gradient_steps, seed_of(self.config.seed, "states", iteration, update))
        if measured is None:
            return Update(scored, shown, None, [], loss)
        log_q = shown[self.own].log_q
        assert log_q is not None
        return Update(scored, shown, replace(measured, loss=torch.tensor(loss)), [torch.zeros_like(log_q)], loss)

    @property
    def _learns_states_of_chain(self) -> bool:
        """What the prior says at the states that its own trajectories went through is asked once, with their density."""
        traits = ObjectiveTraits.of(self.objective)
        return "prior" in traits.compares and not traits.noises and not traits.leaves_own

    def _comparable(self, own: Batch) -> bool:
        """There is a density, and each prompt has as many trajectories as the objective compares: states are learned without."""
        _, sizes = own.prompt.unique(return_counts=True)
        return own.log_q is not None and bool((sizes >= ObjectiveTraits.of(self.objective).smallest_group).all())

    def _led(self, part: Batch, reads: ReadsAdjoint, beta: float) -> Batch:
        """With adjoints, once for all updates."""
        return (
            part if part.adjoint is not None else with_adjoint(self.sampler, part, beta, lean=reads.adjoint == "lean")
        )

    def _of_reward(
        self, parts: Mapping[str, Batch], follows: FollowsReward, beta: float, iteration: int, update: int
    ) -> Update:
        """The posterior's own trajectories are all there are."""
        own = self.sampler.completed(parts[self.own])
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "last", iteration, update))
        loss = Pathwise(self.sampler, beta).push(own, follows.last(own.trajectory.steps, generator))
        assert own.log_q is not None
        measured = replace(self._measured(own, beta), loss=torch.tensor(loss))
        shown = {**parts, self.own: own}
        return Update(shown, shown, measured, [torch.zeros_like(own.log_q)], loss)

    def _measured(self, own: Batch, beta: float) -> Loss:
        """What the objective says of the posterior's own trajectories, for the log."""
        with torch.no_grad(), self.sampler.stopwatch("objective"):
            return self.objective(terms_of(self.sampler, own), beta)

    def _networks(self) -> Networks:
        """Those that the objective compares with."""
        known: dict[str, Callable[[], AbstractContextManager[None]]] = {"prior": self.sampler.prior.as_prior}
        if self.old is not None:
            known["old"] = self.old.worn
        return {name: known[name] for name in ObjectiveTraits.of(self.objective).compares}

    def _scored(self, parts: Mapping[str, Batch], update: int) -> dict[str, Batch]:
        """With both log-densities; after an update the posterior has moved."""
        if update > 0:
            parts = {name: replace(part, log_q=None, kl=None, norm_q=None) for name, part in parts.items()}
        traits = ObjectiveTraits.of(self.objective)
        complete = self.sampler.with_kl if traits.uses_kl else self.sampler.completed
        scored = {name: complete(part) for name, part in parts.items()}
        if traits.estimates_every == 0:
            return scored
        return {name: with_estimates(self.sampler, part, traits.estimates_every) for name, part in scored.items()}

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
