"""How different pictures are from each other, in the embedder's space."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics._clouds import Cloud, clouds_of, distances
from diffusion_rtb.evaluation.metrics._pairs import interval_of, pair_means, resampled
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.evaluation.similarity import (
    distribution,
    mean_pairwise_cosine_distance,
    unit_vectors,
    vendi_score,
)

__all__ = ["Diversity", "lgmd", "mean_pairwise_cosine_distance", "vendi_score"]

SIDES = ("prior", "posterior", "reweighted_prior")

MOST = 5000
"""Samples of one side that are compared across prompts."""

NEAREST = 1e-8
"""Smallest distance, over the root of the dimension, whose logarithm counts."""


class Diversity(Metric):
    """Pairwise cosine distance, Vendi score and LGMD within a prompt, mean over prompts; `across_prompts`: of all of them together.

    All use equally many `samples` of a prompt, because Vendi scores grow with their number. The weights of the re-weighted prior
    are uneven, so its Vendi score errs low: by how much, its ESS says. `intervals` are of the bootstrap; a Vendi score has none,
    because a resampling repeats samples and scores lower. Across prompts at most about `MOST` samples are compared.
    """

    name, needs, columns = "diversity", "embedding", ("distance", "Vendi")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any] | None:
        """Of prior, posterior and re-weighted prior, None for a side that is not known; None with single samples."""
        prompts = posterior.prompt.unique().tolist()
        sides = [side for side in (prior, posterior) if len(side)]
        count = min(int((side.prompt == row).sum()) for side in sides for row in prompts)
        if count < 2:
            return None
        clouds = clouds_of(*_first(prior, posterior, count), beta)
        found: dict[str, Any] = {side: None if side not in clouds else _within(clouds[side], config) for side in SIDES}
        found |= {"samples": count, "embedder": config.embedder and config.embedder.model_dump()}
        if len(prompts) == 1:
            return found | {"across_prompts": None}
        fewer = clouds_of(*_first(prior, posterior, min(count, max(2, MOST // len(prompts)))), beta)
        across: dict[str, Any] = {side: None if side not in fewer else _across(fewer[side]) for side in SIDES}
        return found | {"across_prompts": across | {"samples": len(fewer["posterior"].points)}}

    def row(self, value: Any) -> tuple[str, ...]:
        """The prior's and what is left of it."""
        shown = (("pairwise_cosine_distance", 2), ("vendi", 1))
        sides = [value[side] for side in ("prior", "posterior") if value[side] is not None]
        return tuple(" → ".join(f"{side[key]:.{n}f}" for side in sides) for key, n in shown)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """All, of all sides."""
        labels = (("pairwise_cosine_distance", "pairwise cosine distance"), ("vendi", "Vendi score"), ("lgmd", "LGMD"))
        sides = ("prior", "reweighted_prior", "posterior")
        return {label: {s: value[s][key] if value.get(s) is not None else None for s in sides} for key, label in labels}


def _first(prior: Drawn, posterior: Drawn, count: int) -> tuple[Drawn, Drawn]:
    """Equally many samples of each prompt; a prior without any stays so."""
    return prior.first(count) if len(prior) else prior, posterior.first(count)


def _within(cloud: Cloud, config: EvalConfig) -> dict[str, Any]:
    parts = []
    for row in cloud.prompt.unique().tolist():
        one = cloud[(cloud.prompt == row).nonzero().flatten()]
        parts.append((mean_pairwise_cosine_distance(one.points, one.weights), vendi_score(one.points, one.weights)))
    weights = resampled(cloud, config.bootstrap, seed=0)
    angles = replace(cloud, points=unit_vectors(cloud.points))
    spread = {
        "pairwise_cosine_distance": pair_means(_cosine_distances, angles, angles, (weights, weights), within=True),
        "lgmd": pair_means(_log_distances, cloud, cloud, (weights, weights), within=True),
    }
    intervals = {key: interval_of(values, config.confidence) for key, values in spread.items()}
    return {
        "pairwise_cosine_distance": sum(d for d, _ in parts) / len(parts),
        "vendi": sum(v for _, v in parts) / len(parts),
        "lgmd": intervals["lgmd"]["mean"],
        "intervals": {key: [found["low"], found["high"]] for key, found in intervals.items()},
    }


def _across(cloud: Cloud) -> dict[str, float]:
    angles = replace(cloud, points=unit_vectors(cloud.points))
    return {
        "pairwise_cosine_distance": float(pair_means(_cosine_distances, angles, angles)),
        "vendi": vendi_score(cloud.points, cloud.weights),
        "lgmd": float(pair_means(_log_distances, cloud, cloud)),
    }


def _cosine_distances(x: Tensor, y: Tensor) -> Tensor:
    return 1.0 - x @ y.T


def _log_distances(x: Tensor, y: Tensor) -> Tensor:
    return (distances(x, y) / math.sqrt(x.shape[1])).clamp_min(NEAREST).log()


def lgmd(embeddings: Float[Tensor, "batch features"], weights: Float[Tensor, " batch"] | None = None) -> float:
    r"""Log geometric mean distance: mean over pairs i ≠ j of log(|e_i - e_j| / sqrt(dim)), on embeddings as they are.

    A few pictures that are nearly the same pull it down, where a mean of distances hardly notices. Distances count as at least
    1e-8, as in the authors' code: pictures that are equal to the embedder give -18.4. The authors take final latents for
    embeddings. It shifts with the unit of the embeddings; differences between rows do not. With weights it is
    sum w_i·w_j·log d_ij / sum w_i·w_j.

    Reference: Li et al., "TMPO", 2026, https://arxiv.org/abs/2605.10983

    Raises:
        ValueError: fewer than two embeddings.
    """
    if len(embeddings) < 2:
        raise ValueError(f"A pairwise distance needs at least 2 embeddings, got {len(embeddings)}; raise eval.samples.")
    cloud = Cloud.of(embeddings, None if weights is None else distribution(weights, len(embeddings)))
    return float(pair_means(_log_distances, cloud, cloud))
