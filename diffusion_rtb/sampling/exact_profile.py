"""KL per step of the exact posterior through the same chain, of priors that know it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.estimates import kl_profile
from diffusion_rtb.exact import HasExactTarget
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["exact_profile"]


def exact_profile(
    sampler: Sampler, beta: float, rows: Sequence[int], seeds: Sequence[int]
) -> Float[Tensor, " steps"] | None:
    """E[log p*(x_s | x_t) - log p(x_s | x_t)] of each step, from trajectories of the exact posterior's own denoiser; nats.

    None where the prior knows no exact posterior, none for this reward, or no denoiser of it.

    Args:
        sampler: Holds the prior, the reward and the prompts.
        beta: nats per unit of reward.
        rows: Prompts, one per trajectory.
        seeds: Of their noise.
    """
    prior = sampler.prior
    if not isinstance(prior, HasExactTarget):
        return None
    try:
        target = prior.exact_target(sampler.reward, beta)
    except ValueError:
        return None
    if target.as_exact is None:
        return None
    with target.as_exact():
        drawn = sampler.draw(rows, seeds)
    if not drawn.trajectory.has_density:
        return None
    complete = sampler.completed(drawn)
    assert complete.log_q is not None
    assert complete.log_p is not None
    return kl_profile(complete.log_q, complete.log_p)
