"""Sample the rest of a trajectory whose first states are given, through the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import LOG_DENSITY, entry_of, only_latents, start_at
from diffusion_rtb.chain.scheduler import StepCall, with_previous_sample
from diffusion_rtb.chain.seeds import generators, global_seed, seed_of
from diffusion_rtb.chain.teacher_forcing import is_state
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.interfaces import Prior

__all__ = ["continued"]


def continued(
    prior: Prior, prompts: Sequence[str], seeds: Sequence[int], states: Float[Tensor, "batch known *dims"]
) -> Trajectory:
    """Trajectories that begin with these states and go on as the network as it is now samples; no gradients.

    The given transitions are scored on the way, so that log-densities are known of all steps for one pass of the network.

    Args:
        prior: Samples the posterior, or the prior inside `with prior.as_prior()`.
        prompts: One per trajectory.
        seeds: One per trajectory, for the noise of the steps that are sampled.
        states: x_T and those that follow it.

    Returns:
        The trajectories, with float64 log-densities in nats. The density they were drawn with depends on where the given states
        come from and is not known here: `log_behaviour` is NaN.
    """
    pipe, rows = prior.pipe, generators(seeds)
    start, block = start_at(pipe, states[:, 0].contiguous(), entry_of(prior), draw=True)
    call = prior.arguments(prompts) | only_latents(pipe) | start | {"generator": rows}
    recorder = Continuation(pipe.scheduler, states, rows, prior.as_prior)
    with torch.no_grad(), global_seed(seed_of(0, *seeds)), recorder, block:
        pipe(**call)
    trajectory = recorder.trajectory
    unknown = torch.full_like(trajectory.log_prob, torch.nan)
    return Trajectory(**trajectory.tensors() | {"log_behaviour": unknown})


class Continuation(TrajectoryRecorder):
    """A recorder that gives the pipeline known states first.

    Args:
        scheduler: The pipeline's scheduler.
        states: x_T, which the pipeline is to start from, and the states that follow it.
        generators: One per trajectory.
        prior: See `TrajectoryRecorder`.
    """

    def __init__(
        self,
        scheduler: Any,
        states: Float[Tensor, "batch known *dims"],
        generators: Sequence[torch.Generator],
        prior: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__(scheduler, dtype=LOG_DENSITY, generators=generators, prior=prior)
        self.states = states

    def _record(self, call: StepCall) -> Any:
        following = len(self.steps) + 1
        if following == 1:
            self._check_start(call)
        if following >= self.states.shape[1]:
            return super()._record(call)
        self._check_state(call)
        mean, std = self._transition(call)
        self._check_density(call, std)
        x_s = self.states[:, following].contiguous().to(call.sample)
        # The scheduler steps all the same: it counts, and draws from generators that later steps go on with.
        with self._row_by_row(call):
            output = with_previous_sample(call.made(), x_s)
        return self._append(call, output, mean, std)

    def _check_density(self, call: StepCall, std: float) -> None:
        """The states of a forward chain do not follow the ODE's map, which a chain makes after its noise."""
        if std == 0 and any(step.std > 0 for step in self.steps):
            raise ValueError(
                f"{call.name} makes the step at timestep {call.timestep:g} without noise, so the given states are none of its. "
                "Let the window of noise reach to the schedule's end, or take back_and_forth out of behaviours."
            )

    def _check_start(self, call: StepCall) -> None:
        if call.sample.shape != self.states[:, 0].shape or not is_state(call.sample, self.states[:, 0].to(call.sample)):
            raise ValueError(
                f"The pipeline did not start at the given states (timestep {call.timestep:g}): it draws, noises or packs its first "
                "state in its own way, so trajectories cannot be continued through it. Take back_and_forth out of behaviours."
            )
