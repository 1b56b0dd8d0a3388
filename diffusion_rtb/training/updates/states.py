"""What an objective of states sees of a micro-batch: its states, with what the networks make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.forward_process import Forward, knowing
from diffusion_rtb.chain.normal import precise
from diffusion_rtb.chain.reversal import Reversal
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.chain.teacher_forcing import Visit, Visited
from diffusion_rtb.interfaces import States
from diffusion_rtb.sampling.batch import Batch

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Micro", "Networks"]

Networks = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""Makes, for each network that an objective compares with, a block in which the posterior is that one."""


class Micro:
    """A micro-batch at some of its steps, on the prior's device.

    Args:
        sampler: Whose posterior it is.
        part: Trajectories, or chains of noised samples.
        steps: Of them, with their factors.
        forward: Where its states were noised from x_0 and x_0 is a target; else None.
        weight: The objective's own of each sample, if it has any.
        generator: For what the objective draws.
        reversal: In whose steps it is learned from them; None: in the sampler's own.
    """

    def __init__(
        self,
        sampler: Sampler,
        part: Batch,
        steps: Mapping[int, float],
        forward: Forward | None,
        weight: Float[Tensor, " batch"] | None,
        generator: torch.Generator,
        reversal: Reversal | None = None,
    ) -> None:
        device = sampler.prior.device
        self.prior, self.prompts = sampler.prior, sampler.texts(part.prompt)
        self.features = sampler.features(part.prompt)
        self.prompt, self.reward = part.prompt.to(device), part.reward.to(device)
        self.states = part.trajectory.to(device)
        self.x_0 = precise(self.states.x_0)
        self.std = self.states.std.tolist()
        self.following = [*self.states.timesteps.tolist()[1:], 0.0]
        self.steps, self.forward, self.generator, self.reversal = steps, forward, generator, reversal
        self.weight = None if weight is None else weight.to(device)
        self.adjoint = None if part.adjoint is None else part.adjoint.to(device)
        known = None if part.mean_p is None else part.mean_p[:, list(steps)].to(device)
        self.mean_p = {} if known is None else dict(zip(steps, known.unbind(1), strict=True))

    def visit(self, visit: Visit, *, grad: bool = False) -> None:
        """One network call per step; with `grad` the visitor takes the gradient of each alone."""
        mean = None if self.reversal is None else self.reversal.mean
        visit_states(self.prior, self.prompts, self.states, list(self.steps), visit, grad=grad, mean=mean)

    def means(self, networks: Networks) -> dict[int, dict[str, Tensor]]:
        """Of the transitions of each step, by these networks; the prior's are not asked for again where they are known."""
        found: dict[int, dict[str, Tensor]] = {step: {} for step in self.steps}
        for name, block in networks.items():
            if name == "prior" and self.mean_p:
                for step, mean in self.mean_p.items():
                    found[step][name] = precise(mean)
            else:
                with block():
                    self.visit(lambda at, name=name: found[at.step].__setitem__(name, precise(at.mean)))  # type: ignore[misc]
        return found

    def mean_0(self, at: Visited) -> Tensor | None:
        """The mean by a network that knows x_0; None where x_0 is no target."""
        if self.forward is None:
            return None
        if (
            self.reversal is None and at.step + 1 == self.states.steps
        ):  # it leads to x_0 itself, whatever noise that had
            return self.x_0
        x_t = precise(self.states.x[:, at.step])
        return at.mean_of(knowing(self.forward.predicts, self.x_0, x_t, *self.forward.levels[at.step]))

    def described(self, at: Visited, means: Mapping[str, Tensor]) -> States:
        """What the objective sees of a step."""
        i = at.step
        return States(
            step=i,
            share=i / self.states.steps,
            dense=sum(std > 0 for std in self.std),
            x_t=precise(self.states.x[:, i]),
            x_0=self.x_0,
            following=self.following[i],
            std=self.std[i],
            mean_q=precise(at.mean.detach()),
            means=means,
            mean_0=self.mean_0(at),
            prompt=self.prompt,
            reward=self.reward,
            features=self.features,
            generator=self.generator,
            weight=self.weight,
            adjoint=None if self.adjoint is None else self.adjoint[:, i],
        )
