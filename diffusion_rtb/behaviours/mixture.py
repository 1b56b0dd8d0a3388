"""Which behaviours a run draws from, and how many trajectories per prompt from each."""

from __future__ import annotations

from diffusion_rtb.behaviours.on_policy import OnPolicy
from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.behaviours.source import Source
from diffusion_rtb.config import RunConfig

__all__ = ["sources"]


def sources(config: RunConfig) -> dict[str, tuple[Source, int]]:
    """The behaviours of a run by name, each with its trajectories per prompt."""
    behaviour, group = config.behaviour, config.train.group
    from_prior = round(behaviour.prior_share * group)
    exploration = behaviour.exploration
    on_policy = OnPolicy(config.seed, scale=exploration.scale, until=exploration.until, kind=exploration.kind)
    buffer = PriorBuffer(
        config.seed, size=behaviour.prior_buffer, resample=behaviour.resample, refresh=behaviour.refresh
    )
    return {"posterior": (on_policy, group - from_prior), "prior": (buffer, from_prior)}
