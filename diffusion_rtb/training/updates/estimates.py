"""The reward of unfinished samples: r(x0_hat) at states of a trajectory, x0_hat the prior's estimate of where they lead."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_rtb.chain.forward_process import Forward, denoised
from diffusion_rtb.chain.normal import precise
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.chain.teacher_forcing import Visited
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.sampling.batch import Batch

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["with_estimates"]


def with_estimates(sampler: Sampler, batch: Batch, every: int) -> Batch:
    """The same trajectories with `Batch.estimate`, at x_T and then every so many steps; what is known already is kept.

    One call of the prior's network, of its decoder and of the reward for each such state. A state from which no step has noise
    leads to x_0 itself, so that its estimate is the reward.

    Raises:
        ValueError: a step without noise has steps with noise after it.
    """
    if batch.estimate is not None:
        return batch
    dense = batch.trajectory.stochastic.tolist()
    steps = range(0, len(dense), every)
    looked = [i for i in steps if dense[i]]
    stuck = [i for i in steps if not dense[i] and any(dense[i:])]
    if stuck:
        raise ValueError(
            f"Step {stuck[0]} has no noise and later ones have: V in its boundary form looks at x0_hat there, which is not known. "
            "Take a sampler with noise in every step but the last, or boundary: false."
        )
    ends = _ends(sampler, batch, looked)
    found = [sampler.rewards(ends[i], batch.prompt.tolist()) if i in ends else batch.reward for i in steps]
    return replace(batch, estimate=torch.stack([each.to(batch.reward) for each in found], dim=1))


def _ends(sampler: Sampler, batch: Batch, steps: list[int]) -> dict[int, Tensor]:
    """x0_hat of each step, by the prior, on the host."""
    prior, forward = sampler.prior, Forward.of(sampler.prior.pipe.scheduler, batch.trajectory.timesteps)
    parts: dict[int, list[Tensor]] = {i: [] for i in steps}
    for chunk in sampler.chunks(len(batch)):
        states = batch.trajectory[chunk].to(prior.device)

        def look(at: Visited, states: Trajectory = states) -> None:
            x_t = precise(states.x[:, at.step])
            found = denoised(forward.predicts, x_t, precise(at.output), *forward.levels[at.step])
            parts[at.step].append(found.to(states.x.dtype).cpu())

        with sampler.stopwatch("score"), prior.as_prior():
            visit_states(prior, sampler.texts(batch.prompt[chunk]), states, steps, look)
    return {i: torch.cat(found) for i, found in parts.items()}
