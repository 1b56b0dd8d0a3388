"""From states to an update of the posterior, for objectives that aim the means of transitions (`AimsStates`).

    states x_t of a batch -> mean_p(x_t) -> mean_q(x_t) -> aim -> gradient of |mean_q - aim|² / (2·std²), inside the step

One network call of the prior and one of the posterior, with its gradient, per state; no trajectory is scored. States are what
trajectories went through, or samples noised by the forward process: both are led through the pipeline like a recorded chain, so
that conditioning and guidance need no code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.forward_process import mean_given, signal_and_noise
from diffusion_rtb.chain.normal import gaussian_kl, precise
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.chain.teacher_forcing import Visited
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.interfaces import AimsStates, States
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.schedules import dealt

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
        tilted: Names of the parts whose states were noised from samples of the posterior.
        weights: One per step on its gradient; None: all 1.
    """

    sampler: Sampler
    aims: AimsStates
    beta: float
    tilted: frozenset[str]
    weights: Sequence[float] | None = None

    def push(self, parts: Mapping[str, Batch], count: int | None, seed: int) -> float:
        """The gradient of the loss replaces `.grad` of the posterior's parameters.

            loss = sum over steps, mean over samples, of |mean_q - aim|² / (2·std²), nats

        Args:
            parts: Trajectories, or chains of noised samples, by behaviour.
            count: Steps that a micro-batch gets, drawn at random and re-weighted to stay unbiased; None: all.
            seed: Of the steps, and of what the objective draws.

        Returns:
            The loss, without `weights`; nats.
        """
        parameters = list(self.sampler.prior.parameters().values())
        for parameter in parameters:
            parameter.grad = None
        micro = list(self._micro_batches(parts))
        dense = micro[0][1].trajectory.stochastic.nonzero().flatten().tolist()
        steps = dealt(dense, count, len(micro), seed)
        generator = torch.Generator().manual_seed(seed)
        total, states = 0.0, sum(len(mine) * len(part) for mine, (_, part) in zip(steps, micro, strict=True))
        with self.sampler.stopwatch("backward"):
            for mine, (name, part) in zip(steps, micro, strict=True):
                total += self._push(part, mine, name in self.tilted, generator)
            # Afterwards: a half-precision network passes gradients of single states on without underflow.
            scale = len(dense) / states
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return total * scale

    def _micro_batches(self, parts: Mapping[str, Batch]) -> Iterator[tuple[str, Batch]]:
        for name, part in parts.items():
            for chunk in self.sampler.chunks(len(part)):
                yield name, part[chunk]

    def _push(self, part: Batch, steps: Sequence[int], tilted: bool, generator: torch.Generator) -> float:
        """The gradient of one micro-batch, added up; returns the sum of its losses."""
        prior, prompts = self.sampler.prior, self.sampler.texts(part.prompt)
        states = part.trajectory.to(prior.device)
        means: dict[int, Tensor] = {}
        with prior.as_prior():
            visit_states(prior, prompts, states, steps, lambda at: means.__setitem__(at.step, at.mean))
        describe = self._describe(part, states, means, tilted, generator)
        losses = []

        def backward(at: Visited) -> None:
            aim = self.aims.aim(describe(at), self.beta).detach()
            loss = gaussian_kl(at.mean, precise(aim), float(states.std[at.step]), torch.float64)
            (loss.sum() * (1.0 if self.weights is None else self.weights[at.step])).backward()
            losses.append(loss.detach().sum())

        visit_states(prior, prompts, states, steps, backward, grad=True)
        return float(torch.stack(losses).sum())

    def _describe(
        self, part: Batch, states: Trajectory, means: Mapping[int, Tensor], tilted: bool, generator: torch.Generator
    ) -> Callable[[Visited], States]:
        """What the objective sees of a step of this micro-batch."""
        prior, x_0 = self.sampler.prior, precise(states.x_0)
        features = prior.features(self.sampler.texts(part.prompt))
        levels = _levels(prior.pipe.scheduler, states.timesteps) if tilted else []
        following = [*states.timesteps.tolist()[1:], 0.0]

        def describe(at: Visited) -> States:
            i, std = at.step, float(states.std[at.step])
            x_t = precise(states.x[:, i])
            last = i + 1 == states.steps  # it leads to x_0 itself, whatever noise that had
            mean_0 = None if not tilted else x_0 if last else mean_given(x_0, x_t, std, levels[i], levels[i + 1])
            return States(
                step=i,
                share=i / states.steps,
                x_t=x_t,
                x_0=x_0,
                following=following[i],
                std=std,
                mean_q=precise(at.mean.detach()),
                mean_p=precise(means[i]),
                mean_0=mean_0,
                reward=part.reward.to(prior.device),
                features=features,
                generator=generator,
            )

        return describe


def _levels(scheduler: object, timesteps: Float[Tensor, " steps"]) -> list[tuple[float, float]]:
    """(a_t, b_t) of each state but x_0."""
    a, b = signal_and_noise(scheduler, timesteps)
    return list(zip(a.tolist(), b.tolist(), strict=True))
