"""The same samples at the end of new forward chains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from diffusion_rtb.chain.forward_process import noised_chain
from diffusion_rtb.sampling.batch import Batch

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["noised_anew"]


def noised_anew(sampler: Sampler, ends: Batch, seed: int, *, shared: bool = False) -> Batch:
    """Each x_0 with states of a forward chain of its own, whose log-densities nobody has computed yet.

    Args:
        sampler: Whose prior's scheduler has the forward process.
        ends: Trajectories, or their last states alone.
        seed: Of the noise.
        shared: Samples of one prompt have the same noise: what is compared between them then differs by them alone.
    """
    x_0, timesteps, prior = ends.trajectory.x_0, ends.trajectory.timesteps, sampler.prior
    generator = torch.Generator().manual_seed(seed)
    prompts, group = ends.prompt.unique(return_inverse=True)
    common = torch.randn(len(prompts), len(timesteps), *x_0.shape[1:], generator=generator) if shared else None
    states = []
    for chunk in sampler.chunks(len(x_0)):
        start = x_0[chunk].to(prior.device)
        own = (len(start), len(timesteps), *x_0.shape[1:])
        noise = torch.randn(own, generator=generator) if common is None else common[group[chunk]]
        states.append(noised_chain(prior.pipe.scheduler, start, timesteps.to(prior.device), noise).cpu())
    x = torch.cat([torch.cat(states), x_0[:, None]], 1)
    chain = replace(ends.trajectory, x=x, log_prob=torch.zeros_like(ends.trajectory.log_prob))
    return replace(ends, trajectory=chain, log_q=None, log_p=None, mean_p=None, kl=None, norm_q=None, norm_p=None)
