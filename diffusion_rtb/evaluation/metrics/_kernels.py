"""Squared maximum mean discrepancies under any kernel, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metrics._clouds import Cloud
from diffusion_rtb.evaluation.metrics._pairs import Values, interval_of, pair_means, resampled
from diffusion_rtb.evaluation.similarity import unit_vectors

__all__ = ["kernel_distances"]

SEEDS = {"prior": 0, "reweighted_prior": 0, "posterior": 1, "reference": 2}
"""Of the resampling; both rows of the prior are the same samples."""


def kernel_distances(
    kernel: Values,
    clouds: Mapping[str, Cloud],
    pairs: Sequence[tuple[str, str]],
    config: EvalConfig,
    *,
    scale: float,
    unit: bool,
) -> list[dict[str, float]]:
    """scale·(E k(x, x') + E k(y, y') - 2·E k(x, y)) of each pair of sides, with its interval.

    Sides are resampled by themselves; noise that both share through common seeds is counted twice, and at equal distributions the
    bootstrap of such a statistic errs on the wide side too.

    Args:
        kernel: k.
        clouds: The sides by name.
        pairs: Which to compare.
        config: With `bootstrap` and `confidence`.
        scale: Factor on the result.
        unit: Whether points are scaled to length 1.
    """
    sides = {name: replace(c, points=unit_vectors(c.points)) if unit else c for name, c in clouds.items()}
    weights = {name: resampled(cloud, config.bootstrap, SEEDS[name]) for name, cloud in sides.items()}

    def mean(one: str, other: str) -> Any:
        return pair_means(kernel, sides[one], sides[other], (weights[one], weights[other]))

    own = {name: mean(name, name) for name in {name for pair in pairs for name in pair}}
    return [interval_of(scale * (own[a] + own[b] - 2 * mean(a, b)), config.confidence) for a, b in pairs]
