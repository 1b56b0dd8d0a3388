"""Draw steered samples of a prior, or of its posterior, whole groups at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.rollout import only_latents
from diffusion_rtb.chain.seeds import generators, global_seed, seed_of
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.sampling.sampler import decoded
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.steering._aim import Aim
from diffusion_rtb.steering._learned import value_of
from diffusion_rtb.steering._method import Method

__all__ = ["Steered", "rewards_of", "steered"]


@dataclass(frozen=True, eq=False)
class Steered:
    """What became of some groups of particles."""

    trajectory: Trajectory
    """Of all rows, the groups one after the other; log-densities are those of the network that was steered, float64, nats."""
    reward: Float[Tensor, " rows"]
    log_z: Float[Tensor, " groups"] | None
    """See `Particles.log_z`; None: not known."""
    ess: Float[Tensor, "weighings groups"]
    """Effective sample size as a share, whenever the rows were weighed."""
    means: Float[Tensor, "rows steps *dims"] | None = None
    """See `Particles.means`."""


def steered(
    prior: Prior,
    reward: Reward,
    method: Method,
    prompts: Sequence[str],
    seeds: Sequence[int],
    beta: float,
    *,
    metadata: Sequence[Metadata] | None = None,
    learned: Callable[..., Tensor] | None = None,
    means: bool = False,
) -> Steered:
    """One group of `method.particles` samples per prompt, in one call of the pipeline; no gradients.

    Args:
        prior: Whose prior is steered, or its posterior where the method is one for that.
        reward: What is steered towards, and beta times it the log of the tilt.
        method: How.
        prompts: One per group.
        seeds: One per group; its samples depend on nothing else.
        beta: Nats per unit of reward.
        metadata: Of each prompt, for a reward that takes it.
        learned: V(x_t, t, features) in reward units, for a method whose `value` is not "reward".
        means: Keep those of the steered network's transitions.

    Raises:
        ValueError: the chain, the scheduler or the reward lacks what the method needs; see `Particles`.
    """
    n = method.particles
    texts = [prompt for prompt in prompts for _ in range(n)]
    known = None if metadata is None else [row for row in metadata for _ in range(n)]
    rows = generators([seed_of(seed, "particle", k) for seed in seeds for k in range(n)])
    judged = rewards_of(prior, reward, texts, known)
    aim = Aim(judged, beta, value_of(method.value, learned, prior.features(texts), judged))
    pipe: Any = prior.pipe
    call = only_latents(pipe) | prior.arguments(texts) | {"generator": rows}
    chain = method.around(pipe, aim, seeds=seeds, generators=rows, as_prior=prior.as_prior, means=means)
    block = nullcontext() if method.of_posterior else prior.as_prior()
    with torch.no_grad(), global_seed(seed_of(0, *seeds)), block, chain:
        pipe(**call)
    log_z = chain.log_z if chain.weighs else None
    return Steered(chain.trajectory, chain.reward, log_z, torch.stack(chain.ess), chain.means)


def rewards_of(
    prior: Prior, reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
) -> Callable[[Tensor], Tensor]:
    """r of states: what the prior decodes them to, judged; one prompt per row."""
    name = getattr(reward, "__name__", type(reward).__name__)

    @torch.no_grad()
    def values(x_0: Tensor) -> Tensor:
        return evaluate_reward(reward, decoded(prior, x_0), prompts, name, metadata=metadata)

    return values
