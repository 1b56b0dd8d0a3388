"""From states to an update of the posterior, for objectives that aim the means of transitions (`AimsStates`).

    states x_t of a batch -> mean_p(x_t) -> mean_q(x_t) -> aim -> gradient of |mean_q - aim|² / (2·std²), inside the step

One network call of each network that the objective compares with and one of the posterior, with its gradient, per state; no
trajectory is scored. States are what trajectories went through, or samples noised by the forward process: both are led through the
pipeline like a recorded chain, so that conditioning and guidance need no code here. A sampler whose steps have no noise, or combine
several network answers, is only asked for its levels: mean and std are then those of `chain/reversal.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.chain.forward_process import Forward
from diffusion_rtb.chain.normal import gaussian_kl, precise
from diffusion_rtb.chain.reversal import Reversal
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.teacher_forcing import Visited
from diffusion_rtb.interfaces import AimsStates, Samples, WeighsSamples
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.noising import noised_anew
from diffusion_rtb.training.updates.states import Micro, Networks
from diffusion_rtb.training.updates.step_choice import Chosen, StepChoice, stratified

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Regression"]


@dataclass(frozen=True, eq=False)
class Regression:
    """An update's gradient, for one objective.

    Args:
        sampler: Whose posterior it is.
        aims: The objective.
        beta: Nats per unit of reward.
        networks: Those that the objective compares with.
        tilted: Names of the parts whose states were noised from samples of the posterior.
        weights: One per step on its gradient; None: all 1.
        choice: Of the steps, by what is known of their gradients; None: all alike.
    """

    sampler: Sampler
    aims: AimsStates
    beta: float
    networks: Networks
    tilted: frozenset[str] = frozenset()
    weights: Sequence[float] | None = None
    choice: StepChoice | None = None

    def push(self, parts: Mapping[str, Batch], count: int | None, seed: int) -> float:
        """The gradient of the loss replaces `.grad` of the posterior's parameters.

            loss = sum over steps, mean over samples, of |mean_q - aim|² / (2·std²), nats

        Args:
            parts: Trajectories, or chains of noised samples, by behaviour.
            count: Steps that a micro-batch gets, see `step_choice.py`; None: all.
            seed: Of the steps, of new noise, and of what the objective draws.

        Returns:
            The loss, without `weights`; nats.
        """
        parameters = list(self.sampler.prior.parameters().values())
        for parameter in parameters:
            parameter.grad = None
        watching = nullcontext() if self.choice is None else self.choice.watching(parameters)
        with self.sampler.stopwatch("backward"), watching:
            parts, reversal = self._in_steps(self._noised(parts, seed))
            cut = list(self._cut(parts))
            dense = cut[0][1].trajectory.stochastic.nonzero().flatten().tolist()
            steps = (self.choice.chosen if self.choice else stratified)(dense, count, len(cut), seed)
            total = sum(self._push(micro) for micro in self._micro_batches(cut, steps, seed, reversal))
            # Afterwards: a half-precision network passes gradients of single states on without underflow.
            scale = len(dense) / sum(len(mine) * len(part) for mine, (_, part) in zip(steps, cut, strict=True))
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return total * scale

    def _noised(self, parts: Mapping[str, Batch], seed: int) -> Mapping[str, Batch]:
        """The states that the objective learns from."""
        if not self._traits.noises:
            return parts
        seeds = {name: seed_of(seed, "forward", name, int(part.prompt[0])) for name, part in parts.items()}
        shared = ObjectiveTraits.of(self.aims).pairs_states
        return {name: noised_anew(self.sampler, part, seeds[name], shared=shared) for name, part in parts.items()}

    def _in_steps(self, parts: Mapping[str, Batch]) -> tuple[Mapping[str, Batch], Reversal | None]:
        """The same with the deviations of the steps that are learned, and these steps where they are not the sampler's own."""
        chain = next(iter(parts.values())).trajectory
        reversal = Reversal.where_needed(self.sampler.prior.pipe.scheduler, chain)
        if reversal is None:
            return parts, None
        chains = {name: replace(part.trajectory, std=reversal.std) for name, part in parts.items()}
        # Their means are not those of the sampler's own steps, which may be known.
        return {name: replace(part, trajectory=chains[name], mean_p=None) for name, part in parts.items()}, reversal

    @property
    def _traits(self) -> ObjectiveTraits:
        return ObjectiveTraits.of(self.aims)

    def _micro_batches(
        self,
        cut: Sequence[tuple[str, Batch]],
        steps: Sequence[Chosen],
        seed: int,
        reversal: Reversal | None,
    ) -> Iterator[Micro]:
        """One after the other, so that the device holds one."""
        known = [self._traits.noises or name in self.tilted for name, _ in cut]
        scheduler, chain = self.sampler.prior.pipe.scheduler, cut[0][1].trajectory
        forward = Forward.of(scheduler, chain.timesteps) if any(known) else None
        generator = torch.Generator().manual_seed(seed)

        def micro(i: int, weight: Tensor | None) -> Micro:
            return Micro(self.sampler, cut[i][1], steps[i], forward if known[i] else None, weight, generator, reversal)

        bounds = None
        if self._traits.reads_bounds:
            dense = int(chain.stochastic.sum())
            bounds = torch.cat([self._bounds(micro(i, None)) * (dense / len(steps[i])) for i in range(len(cut))])
        weights = self._weights([part for _, part in cut], bounds)
        for i, weight in enumerate(weights):
            yield micro(i, weight)

    def _cut(self, parts: Mapping[str, Batch]) -> Iterator[tuple[str, Batch]]:
        for name, part in parts.items():
            for chunk in self.sampler.chunks(len(part)):
                yield name, part[chunk]

    def _weights(self, parts: Sequence[Batch], bounds: Tensor | None) -> Sequence[Tensor | None]:
        """The objective's own numbers, one of each sample, by micro-batch."""
        if not isinstance(self.aims, WeighsSamples):
            return [None] * len(parts)
        prompt, reward = (torch.cat([getattr(part, name) for part in parts]) for name in ("prompt", "reward"))
        return self.aims.weights(Samples(prompt, reward, bounds), self.beta).split([len(part) for part in parts])

    def _bounds(self, micro: Micro) -> Float[Tensor, " batch"]:
        """How much less q errs than the network it is compared with, over the steps; nats, on the host."""
        known: dict[int, tuple[Tensor, Tensor]] = {}

        def look(at: Visited) -> None:
            mean_0 = micro.mean_0(at)
            assert mean_0 is not None
            known[at.step] = mean_0, gaussian_kl(mean_0, precise(at.mean), micro.std[at.step], torch.float64)

        micro.visit(look)
        less = torch.zeros(len(micro.reward), dtype=torch.float64)
        for step, mean in micro.means(self.networks).items():
            (other,) = mean.values()
            mean_0, error = known[step]
            less += micro.steps[step] * (gaussian_kl(mean_0, other, micro.std[step], torch.float64) - error).cpu()
        return less

    def _push(self, micro: Micro) -> float:
        """The gradient of one micro-batch, added up; returns the sum of its losses."""
        means = micro.means({} if self._traits.reads_bounds else self.networks)
        losses = []

        def backward(at: Visited) -> None:
            aim = self.aims.aim(micro.described(at, means[at.step]), self.beta).detach()
            loss = gaussian_kl(at.mean, precise(aim), micro.std[at.step], torch.float64)
            factor = micro.steps[at.step]
            (loss.sum() * (factor if self.weights is None else factor * self.weights[at.step])).backward()
            losses.append(loss.detach().sum() * factor)
            if self.choice is not None:
                self.choice.note(at.step, factor * len(loss))

        micro.visit(backward, grad=True)
        return float(torch.stack(losses).sum())
