"""The section `behaviour` of a config: where the training trajectories come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from diffusion_rtb.config.section import Section

__all__ = ["BackAndForthConfig", "BehaviourConfig", "ExplorationConfig", "ReplayConfig"]

Share = Annotated[float, Field(ge=0, lt=1)]
Natural = Annotated[int, Field(ge=0)]


class ExplorationConfig(Section):
    """Extra noise while sampling, which decays linearly to none."""

    scale: Annotated[float, Field(ge=0)] = 0.0
    """Size at iteration 0; 0 switches exploration off."""
    until: PositiveInt = 1
    """Iteration from which on there is none."""
    kind: Literal["relative", "added"] = "relative"
    """relative: std·(1 + scale); added: sqrt(std² + scale²)."""
    measured: Annotated[float, Field(ge=0, le=1)] = 0.25
    """While there is some: trajectories without it, as a share of the group (two at least), from which reward, elbo, kl and ess are
    measured; 0: these are not logged."""


class ReplayConfig(Section):
    """Past trajectories of the posterior, drawn again."""

    share: Share = 0.0
    """Share of each prompt's group that is replayed; 0 switches replay off."""
    capacity: PositiveInt = 256
    """Trajectories kept per prompt; the oldest go first."""
    priority: Literal["uniform", "reward", "importance"] = "uniform"
    """uniform; reward: by the rank of the reward; importance: proportional to exp(beta·r)·p / (density they were drawn with)."""


class BackAndForthConfig(Section):
    """Good samples, noised back by the scheduler's forward process and denoised again by the posterior."""

    share: Share = 0.0
    """Share of each prompt's group that is made so; 0 switches it off."""
    depth: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the chain's steps that the posterior denoises anew; 1: all but the very first state is new."""
    pool: PositiveInt = 256
    """Samples kept per prompt, from which those noised are chosen by the rank of their reward; the oldest go first."""


class BehaviourConfig(Section):
    """Which chains the training trajectories come from: the posterior, with or without extra noise, the prior, the past."""

    prior_share: Share = 0.0
    """Share of each prompt's group that is taken from stored prior trajectories."""
    prior_buffer: Natural = 64
    """Prior trajectories per prompt, drawn once: for prior_share, which keeps them, and for an objective's warm-up."""
    resample: bool = True
    """Take stored prior trajectories with probability proportional to exp(beta·r) instead of uniformly."""
    refresh: Natural = 0
    """New prior trajectories per prompt and iteration; they replace the oldest."""
    exploration: ExplorationConfig = ExplorationConfig()
    replay: ReplayConfig = ReplayConfig()
    back_and_forth: BackAndForthConfig = BackAndForthConfig()

    @property
    def shares(self) -> dict[str, float]:
        """Share of each prompt's group by the key that sets it; the rest is the posterior's own."""
        return {
            "prior_share": self.prior_share,
            "replay.share": self.replay.share,
            "back_and_forth.share": self.back_and_forth.share,
        }

    @model_validator(mode="after")
    def _some_of_its_own(self) -> BehaviourConfig:
        if sum(self.shares.values()) >= 1:
            used = ", ".join(f"{key} {share:g}" for key, share in self.shares.items() if share > 0)
            raise ValueError(
                f"{used} together leave nothing to the posterior's own trajectories: they must sum to less than 1"
            )
        return self

    @model_validator(mode="after")
    def _buffer(self) -> BehaviourConfig:
        if self.prior_share > 0 and self.prior_buffer == 0:
            raise ValueError(f"prior_share {self.prior_share:g} needs a prior_buffer of at least 1, got 0")
        if self.refresh > self.prior_buffer:
            raise ValueError(f"refresh {self.refresh} is larger than the prior_buffer {self.prior_buffer} it goes into")
        return self
