"""The gradient of an objective that follows the reward's own (`FollowsReward`), through the last steps of the posterior's chains.

    x_s = mean_q(x_t) + std·z        z as it was drawn
    a_0 = -beta·grad r(x_0)                                                         through the decoder
    for each step x_t -> x_s, the last first:
        gradient of <a_s, mean_q(x_t)> + KL(mean_q(x_t), mean_p(x_t)) in the parameters: added up; in x_t: a_t

One step's graph at a time, made anew from the recorded state and freed at once: the exact gradient through all steps in the
activation memory of one network call. A step is led through the pipeline like a replayed one, so that conditioning and guidance
need no code here. It takes a call of the posterior with its gradient, and for the KL two of the prior, one of them with its
gradient in x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import DecodesWithGradient
from diffusion_rtb.chain.normal import gaussian_kl, power_of_two, precise
from diffusion_rtb.chain.recordable import is_ode_step
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.chain.teacher_forcing import Visit, Visited
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.scoring.call import differentiable_reward

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Chain", "Pathwise", "reward_slope", "slopes"]


@dataclass(frozen=True, eq=False)
class Pathwise:
    """An update's gradient.

    Args:
        sampler: Whose posterior it is.
        beta: Nats per unit of reward.
    """

    sampler: Sampler
    beta: float

    def push(self, part: Batch, last: int) -> float:
        """The gradient of the loss replaces `.grad` of the posterior's parameters.

        Args:
            part: The posterior's own trajectories.
            last: K.

        Returns:
            mean of -beta·r(x_0) + sum over the last K steps of KL; nats.
        """
        parameters = list(self.sampler.prior.parameters().values())
        for parameter in parameters:
            parameter.grad = None
        with self.sampler.stopwatch("reward"):
            slope = slopes(self.sampler, part, self.beta)
        # Half-precision networks and states pass gradients on in their own dtype: see `push_back`.
        unit = power_of_two(float(slope.abs().max()))
        paid = 0.0
        with self.sampler.stopwatch("backward"):
            for chunk in self.sampler.chunks(len(part)):
                paid += self._through(part[chunk], slope[chunk], unit, last)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(unit / len(part))
        return paid / len(part) - self.beta * float(part.reward.double().mean())

    def _through(self, part: Batch, slope: Float[Tensor, "batch *dims"], unit: float, last: int) -> float:
        """Back through the last steps of one micro-batch; returns the sum of their KLs, nats."""
        states = part.trajectory.to(self.sampler.prior.device)
        steps = range(states.steps - last, states.steps)
        chain = Chain(self.sampler, self.sampler.texts(part.prompt), states, unit)
        chain.look(steps)
        along = slope.to(self.sampler.prior.device) / unit
        for i in reversed(steps):
            along = chain.back(i, along)
        return chain.paid


@dataclass(eq=False)
class Chain:
    """One micro-batch on its way back."""

    sampler: Sampler
    prompts: Sequence[str]
    states: Trajectory
    unit: float
    means: dict[int, Tensor] = field(default_factory=dict)
    """mean_p of each step."""
    of_prior: set[int] = field(default_factory=set)
    """Steps that the scheduler leaves to the ODE: the prior's own map is what the chain went through."""
    paid: float = 0.0
    """Sum of the KLs so far; nats."""
    connected: bool = False
    """The network was seen to be in the graph."""

    def look(self, steps: Sequence[int]) -> None:
        """The prior's means at these steps, and which steps are the prior's."""
        prior = self.sampler.prior

        def keep(at: Visited) -> None:
            self.means[at.step] = at.mean
            if is_ode_step(prior.pipe.scheduler, self.states.timesteps[at.step]):
                self.of_prior.add(at.step)

        with prior.as_prior():
            visit_states(prior, self.prompts, self.states, steps, keep, maps=True)

    def back(self, i: int, along: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The gradient in x_t of one step from that in x_s, and the parameters' added up; both divided by `unit`."""
        if float(self.states.std[i]) == 0:
            return self._through_map(i, along)
        x = self.states.x.detach().requires_grad_()
        apart: list[Tensor] = []

        def backward(at: Visited) -> None:
            self._check_network(at, x)
            kl = gaussian_kl(at.mean, self.means[i], float(self.states.std[i]), torch.float64).sum()
            ((along * at.mean).sum() + kl / self.unit).backward()
            self.paid += float(kl.detach())
            apart.append(self._apart(at, i))

        self._visit(i, x, backward)
        assert x.grad is not None
        with self.sampler.prior.as_prior():  # mean_p moves with x_t too
            return precise(x.grad[:, i]) - self.pulled(i, apart[0])

    def full(self, i: int, along: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The gradient of `back` in x_t, and nothing in the parameters."""
        if float(self.states.std[i]) == 0:
            return self._through_map(i, along)
        x = self.states.x.detach().requires_grad_()
        found: list[Tensor] = []

        def pull(at: Visited) -> None:
            self._check_network(at, x)
            apart = self._apart(at, i)
            found.extend([apart, *torch.autograd.grad(((along + apart) * at.mean).sum(), x)])

        self._visit(i, x, pull)
        apart, slope = found
        with self.sampler.prior.as_prior():
            return precise(slope[:, i]) - self.pulled(i, apart)

    def lean(self, i: int, along: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The gradient in x_t of <along, mean_p(x_t)>."""
        with self.sampler.prior.as_prior():
            return self.pulled(i, along)

    def _apart(self, at: Visited, i: int) -> Float[Tensor, "batch *dims"]:
        """(mean_q - mean_p) / std², divided by `unit`."""
        return (at.mean.detach() - self.means[i]) / (float(self.states.std[i]) ** 2 * self.unit)

    def _through_map(self, i: int, along: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """Of a step without noise."""
        with self.sampler.prior.as_prior() if i in self.of_prior else nullcontext():
            return self.pulled(i, along)

    def pulled(self, i: int, along: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *dims"]:
        """The gradient of <along, mean(x_t)> in x_t alone, under the network as it is now."""
        x = self.states.x.detach().requires_grad_()
        found: list[Tensor] = []

        def pull(at: Visited) -> None:
            self._check_network(at, x)
            found.extend(torch.autograd.grad((along * at.mean).sum(), x))

        self._visit(i, x, pull)
        return precise(found[0][:, i])

    def _visit(self, i: int, x: Tensor, visit: Visit) -> None:
        states = replace(self.states, x=x)
        visit_states(self.sampler.prior, self.prompts, states, [i], visit, grad=True, maps=True)

    def _check_network(self, at: Visited, x: Tensor) -> None:
        """Refuse a pipeline that cuts its network off from the state: the gradient would be wrong, and nothing would show it."""
        if self.connected:
            return
        (slope,) = torch.autograd.grad(at.output.float().sum(), x, retain_graph=True, allow_unused=True)
        if slope is None:
            raise ValueError(
                f"{type(self.sampler.prior.pipe).__name__} takes the state out of the graph before its network sees it (detach, "
                "no_grad, NumPy), so no gradient goes through its steps. Use an objective that takes single steps, such as rtb."
            )
        self.connected = True


def slopes(sampler: Sampler, part: Batch, beta: float) -> Float[Tensor, "batch *dims"]:
    """-beta·grad r(x_0) of each trajectory, on the host, float32 or better; see `reward_slope`."""
    return torch.cat([-beta * reward_slope(sampler, part[chunk]).cpu() for chunk in sampler.chunks(len(part))])


def reward_slope(sampler: Sampler, part: Batch) -> Float[Tensor, "batch *dims"]:
    """grad r(x_0) of one micro-batch, through the prior's decoder, on its device; float32 or better.

    Raises:
        RewardError: the reward has no gradient, or breaks its contract.
        ValueError: the prior's decoder has none.
        NotFiniteError: the gradient is.
    """
    prior, reward = sampler.prior, sampler.reward
    name = getattr(reward, "__name__", type(reward).__name__)
    if not isinstance(prior, DecodesWithGradient):
        raise ValueError(
            f"prior {type(prior).__name__} has no decode_with_gradient: see `abilities.DecodesWithGradient`."
        )
    x_0 = part.trajectory.x_0.to(prior.device).detach().requires_grad_()
    with torch.enable_grad():
        with doing("decoding samples"):
            images = prior.decode_with_gradient(x_0)
        known = [sampler.metadata[int(row)] for row in part.prompt]
        values = differentiable_reward(reward, images, sampler.texts(part.prompt), name, known)
        (slope,) = torch.autograd.grad(values.double().sum(), x_0)
    bad = (~slope.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(
            f"Reward {name!r}: the gradient at sample {bad[0]} is NaN or infinite ({len(bad)} of {len(x_0)}), the reward itself is "
            "not: a root or a division at 0 inside it, or half precision. Bound it there, or use dtype: float32."
        )
    return precise(slope)
