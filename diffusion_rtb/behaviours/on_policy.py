"""On-policy trajectories, optionally with more noise than the posterior draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from diffusion_rtb.behaviours._source import Source
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["OnPolicy"]


class OnPolicy(Source):
    r"""Trajectories of the posterior as it is now, with exploration noise that decays linearly to none.

    With e = exploration·max(0, 1 - iteration/until) a transition of standard deviation std is drawn with

        "relative":  (1 + e)·std                     "added":  sqrt(std² + e²)     (RTB 2024, arXiv 2405.20971, section 3.1)

    log_q stays the density of the posterior itself: the objectives are valid for any behaviour with full support. What such
    trajectories say of the posterior's reward, KL and ELBO is wrong, however: their states are wider too. So `measured` more per
    prompt are drawn without the noise, to be looked at and not to be trained on.

    Args:
        exploration: e at iteration 0; 0: the posterior as it is.
        until: Iteration from which on there is no exploration.
        kind: How e enters.
        measured: While there is exploration: trajectories without it, as a share of the group (two at least), from which reward,
            elbo, kl and ess are measured; 0: these are not logged.
    """

    name = "posterior"
    share = 0.0
    """It has no share of its own: all that the others leave."""

    def __init__(
        self,
        exploration: Annotated[float, Field(ge=0)] = 0.0,
        until: PositiveInt = 1,
        kind: Literal["relative", "added"] = "relative",
        measured: Annotated[float, Field(ge=0, le=1)] = 0.25,
    ) -> None:
        self.exploration = exploration
        self.until = until
        self.kind = kind
        self.measured = measured
        self.off_policy = self.needs_noise = exploration > 0

    def noise_scale(self, iteration: int) -> Callable[[float], float] | None:
        """The factor on a transition's standard deviation, or None when there is no exploration."""
        e = self.exploration * max(0.0, 1 - iteration / self.until)
        if e == 0:
            return None
        if self.kind == "relative":
            return lambda std: 1 + e
        return lambda std: math.sqrt(1 + (e / std) ** 2)

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; seeds depend on the run, the iteration, the prompt and the sample."""
        pairs = numbered(rows, count)
        seeds = [seed_of(self.seed, "train", iteration, *pair) for pair in pairs]
        return sampler.draw([row for row, _ in pairs], seeds, noise_scale=self.noise_scale(iteration))

    def own(self, sampler: Sampler, rows: Sequence[int], iteration: int) -> Batch | None:
        """Trajectories of the posterior itself, where `draw` answers wider ones; None where none are asked for."""
        if self.measured == 0:
            return None
        pairs = numbered(rows, max(2, round(self.measured * self.group)))
        seeds = [seed_of(self.seed, "measured", iteration, *pair) for pair in pairs]
        return sampler.draw([row for row, _ in pairs], seeds)
