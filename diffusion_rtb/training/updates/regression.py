"""From states to an update of the posterior, for objectives that aim the means of transitions (`AimsStates`).

    states x_t of a batch -> mean_p(x_t) -> mean_q(x_t) -> aim -> gradient of |mean_q - aim|² / (2·std²), inside the step

One network call of each network that the objective compares with and one of the posterior, with its gradient, per state; no
trajectory is scored. States are what trajectories went through, or samples noised by the forward process: both are led through the
pipeline like a recorded chain, so that conditioning and guidance need no code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.chain.normal import gaussian_kl, precise
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.teacher_forcing import Visited
from diffusion_rtb.interfaces import AimsStates, Samples, WeighsSamples
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.noising import noised_anew
from diffusion_rtb.training.schedules import dealt
from diffusion_rtb.training.updates.states import Forward, Micro, Networks

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
    """

    sampler: Sampler
    aims: AimsStates
    beta: float
    networks: Networks
    tilted: frozenset[str] = frozenset()
    weights: Sequence[float] | None = None

    def push(self, parts: Mapping[str, Batch], count: int | None, seed: int) -> float:
        """The gradient of the loss replaces `.grad` of the posterior's parameters.

            loss = sum over steps, mean over samples, of |mean_q - aim|² / (2·std²), nats

        Args:
            parts: Trajectories, or chains of noised samples, by behaviour.
            count: Steps that a micro-batch gets, drawn at random and re-weighted to stay unbiased; None: all.
            seed: Of the steps, of new noise, and of what the objective draws.

        Returns:
            The loss, without `weights`; nats.
        """
        parameters = list(self.sampler.prior.parameters().values())
        for parameter in parameters:
            parameter.grad = None
        with self.sampler.stopwatch("backward"):
            parts = self._noised(parts, seed)
            cut = list(self._cut(parts))
            dense = cut[0][1].trajectory.stochastic.nonzero().flatten().tolist()
            steps = dealt(dense, count, len(cut), seed)
            total = sum(self._push(micro) for micro in self._micro_batches(cut, steps, seed))
            # Afterwards: a half-precision network passes gradients of single states on without underflow.
            scale = len(dense) / sum(len(mine) * len(part) for mine, (_, part) in zip(steps, cut, strict=True))
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return total * scale

    def _noised(self, parts: Mapping[str, Batch], seed: int) -> Mapping[str, Batch]:
        """The states that the objective learns from."""
        if not self._noises:
            return parts
        seeds = {name: seed_of(seed, "forward", name, int(part.prompt[0])) for name, part in parts.items()}
        return {name: noised_anew(self.sampler, part, seeds[name]) for name, part in parts.items()}

    @property
    def _noises(self) -> bool:
        return ObjectiveTraits.of(self.aims).noises

    def _micro_batches(
        self, cut: Sequence[tuple[str, Batch]], steps: Sequence[list[int]], seed: int
    ) -> Iterator[Micro]:
        """One after the other, so that the device holds one."""
        known = [self._noises or name in self.tilted for name, _ in cut]
        scheduler, timesteps = self.sampler.prior.pipe.scheduler, cut[0][1].trajectory.timesteps
        forward = Forward.of(scheduler, timesteps) if any(known) else None
        generator = torch.Generator().manual_seed(seed)
        weights = self._weights([part for _, part in cut])
        for (_, part), mine, target, weight in zip(cut, steps, known, weights, strict=True):
            yield Micro(self.sampler, part, mine, forward if target else None, weight, generator)

    def _cut(self, parts: Mapping[str, Batch]) -> Iterator[tuple[str, Batch]]:
        for name, part in parts.items():
            for chunk in self.sampler.chunks(len(part)):
                yield name, part[chunk]

    def _weights(self, parts: Sequence[Batch]) -> Sequence[Tensor | None]:
        """The objective's own numbers, one of each sample, by micro-batch."""
        if not isinstance(self.aims, WeighsSamples):
            return [None] * len(parts)
        samples = Samples(torch.cat([part.prompt for part in parts]), torch.cat([part.reward for part in parts]))
        return self.aims.weights(samples, self.beta).split([len(part) for part in parts])

    def _push(self, micro: Micro) -> float:
        """The gradient of one micro-batch, added up; returns the sum of its losses."""
        means = micro.means(self.networks)
        losses = []

        def backward(at: Visited) -> None:
            aim = self.aims.aim(micro.described(at, means[at.step]), self.beta).detach()
            loss = gaussian_kl(at.mean, precise(aim), micro.std[at.step], torch.float64)
            (loss.sum() * (1.0 if self.weights is None else self.weights[at.step])).backward()
            losses.append(loss.detach().sum())

        micro.visit(backward, grad=True)
        return float(torch.stack(losses).sum())
