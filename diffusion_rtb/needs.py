"""What a method may need that a prior, a reward, a sampler or the rest of a config lacks, and the nearest one that does without.

One table: each refusal of a method ends with `instead`, and each entry is a component as a config has it, so that it can be tried.
The page docs/which-method.md chooses among all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["NEEDS", "Kind", "Need", "instead"]

Kind = Literal["objective", "behaviour", "steering"]


@dataclass(frozen=True)
class Need:
    """One thing that some methods need."""

    what: str
    """It, as in "needs ..."."""
    objective: str = ""
    """The nearest objective that does without, in YAML; empty: no objective needs it."""
    behaviour: str = ""
    """The nearest behaviour, likewise."""
    steering: str = ""
    """The nearest way to steer, likewise."""


NEEDS: Mapping[str, Need] = MappingProxyType(
    {
        "gradient": Need("a reward with a gradient", objective="value_gradient"),
        "decoder": Need("images with a gradient in x_0", objective="value_gradient"),
        "own": Need("the posterior's own trajectories", objective="rtb"),
        "density": Need("the density that a trajectory was drawn with", objective="rtb"),
        "newest": Need("trajectories of the posterior as it is now", objective="rtb"),
        "group": Need("several samples per prompt", objective="{component: rtb, log_z: per_prompt}"),
        "rewards": Need("rewards that are numbers", objective="diffusion_dpo"),
        "samples": Need("samples of the posterior, noised", objective="value_gradient"),
        "beta": Need("one beta", objective="rtb"),
        "reward": Need("a reward that stays", objective="rtb"),
        "process": Need("one process", objective="rtb"),
        "value": Need("a learned V", steering="smc"),
        "posterior": Need("a trained posterior", steering="smc"),
        "estimate": Need(
            "an estimate of x_0 from x_t",
            objective="rtb",
            behaviour="{component: prior_buffer, share: 0.25}",
            steering="best_of",
        ),
        "noise": Need(
            "steps with noise",
            objective="value_gradient",
            behaviour="{component: prior_buffer, share: 0.25}",
            steering="best_of",
        ),
    }
)


def instead(need: str, kind: Kind) -> str:
    """How a refusal ends: "The nearest that does without: NAME."."""
    return f"The nearest that does without: {kind}: {getattr(NEEDS[need], kind)}."
