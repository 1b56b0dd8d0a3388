"""A number of each sample, by side: its means over prompts with their intervals, and how the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.bootstrap import bootstrap_interval, reweighted_interval
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["arrow", "refuse_vectors", "side_means", "side_means_of"]


def side_means(prior: Drawn, posterior: Drawn, log_w: Float[Tensor, " prior"], config: EvalConfig) -> dict[str, Any]:
    """Means over prompts of `prior`, `posterior` and `reweighted_prior`, with their intervals.

    None of the prior where it has no samples, of the re-weighted one also where nobody knows the weights.

    Args:
        prior: With the number as `reward`.
        posterior: The same.
        log_w: beta·r of the prior's samples, NaN where unknown; nats.
        config: Of intervals.
    """
    asked = config.confidence, config.bootstrap
    found: dict[str, Any] = {
        name: asdict(bootstrap_interval(side.reward.double(), *asked, groups=side.prompt)) if len(side) else None
        for name, side in (("prior", prior), ("posterior", posterior))
    }
    known = len(prior) > 0 and bool(log_w.isfinite().all())
    exact = reweighted_interval(prior.reward, log_w, *asked, groups=prior.prompt) if known else None
    return found | {"reweighted_prior": exact and asdict(exact)}


def side_means_of(
    values: Sequence[Float[Tensor, " _"] | None], prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig
) -> dict[str, Any] | None:
    """`side_means` of what `Metric.kept` has of prior and posterior; None where the posterior's samples were not asked."""
    before, after = values
    if after is None:
        return None
    scored = Drawn.none() if before is None else replace(prior, reward=before)
    return side_means(scored, replace(posterior, reward=after), beta * prior.reward.double(), config)


def arrow(sides: Mapping[str, Any]) -> str:
    """Prior and posterior as the terminal shows them, or the posterior alone."""
    before = "" if sides["prior"] is None else f"{sides['prior']['mean']:.2f} → "
    return f"{before}{sides['posterior']['mean']:.2f}"


def refuse_vectors(metric: str, images: Float[Tensor, "batch *shape"]) -> None:
    """Raise ValueError where the samples are no pictures."""
    if images.ndim != 4:
        raise ValueError(
            f"eval.metrics: {metric} is of pictures, and this prior's samples are vectors {tuple(images.shape[1:])}; "
            "leave it out."
        )
