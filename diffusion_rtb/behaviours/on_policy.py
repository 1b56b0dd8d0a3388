"""On-policy trajectories, optionally with more noise than the posterior draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["OnPolicy"]


class OnPolicy:
    r"""Trajectories of the posterior as it is now, with exploration noise that decays linearly to none.

    With e = scale·max(0, 1 - iteration/until) a transition of standard deviation std is drawn with

        "relative":  (1 + e)·std                     "added":  sqrt(std² + e²)     (RTB 2024, arXiv 2405.20971, section 3.1)

    log_q stays the density of the posterior itself: the objectives are valid for any behaviour with full support. What such
    trajectories say of the posterior's reward, KL and ELBO is wrong, however: their states are wider too. So `measured` more per
    prompt are drawn without the noise, to be looked at and not to be trained on.

    Args:
        seed: The run's seed.
        scale: e at the first iteration; 0 is on-policy.
        until: The iteration from which there is no exploration.
        kind: How e enters.
        measured: Trajectories per prompt without exploration while there is some; 0: none.
    """

    def __init__(
        self,
        seed: int,
        *,
        scale: float = 0.0,
        until: int = 1,
        kind: Literal["relative", "added"] = "relative",
        measured: int = 2,
    ) -> None:
        self.seed = seed
        self.scale = scale
        self.until = until
        self.kind = kind
        self.measured = measured

    def noise_scale(self, iteration: int) -> Callable[[float], float] | None:
        """The factor on a transition's standard deviation, or None when there is no exploration."""
        e = self.scale * max(0.0, 1 - iteration / self.until)
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
        pairs = numbered(rows, self.measured)
        seeds = [seed_of(self.seed, "measured", iteration, *pair) for pair in pairs]
        return sampler.draw([row for row, _ in pairs], seeds)

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Nothing is remembered."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        return
