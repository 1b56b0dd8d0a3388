"""Reward of prior, posterior and re-weighted prior: means, quantiles and the paired difference, all with intervals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import within_prompts
from diffusion_rtb.evaluation.bootstrap import Interval, bootstrap_interval, quantile_intervals
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics._sides import side_means
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["QUANTILES", "RewardMetric", "of_scores", "paired_difference"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class RewardMetric(Metric):
    """The rise is stated in the prior's standard deviation over all its samples and in its deviation within a prompt."""

    name, needs = "reward", None

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """See `of_scores`; samples of the prior are re-weighted by exp(beta·r)."""
        return of_scores(prior, posterior, beta * prior.reward.double(), config)

    def sentence(self, value: Any, beta: float) -> str:
        """The difference at equal noise, and where the quantiles went."""
        change = value.get("paired_difference")
        if change is None:
            return ""
        sides = (value["quantiles"][side] for side in ("prior", "posterior"))
        before, after = (" / ".join(f"{each['mean']:.3g}" for each in side.values()) for side in sides)
        shares = " / ".join(f"{100 * share:.0f}" for share in QUANTILES)
        return (
            f"Reward higher by {change['mean']:.3g} [{change['low']:.3g}, {change['high']:.3g}] than the prior's at the same "
            f"prompts and noise. Quantiles {shares} %: {before} → {after}."
        )

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Means with their intervals."""
        return {"reward": {side: value[side] for side in ("prior", "reweighted_prior", "posterior")}}


def of_scores(prior: Drawn, posterior: Drawn, log_w: Float[Tensor, " prior"], config: EvalConfig) -> dict[str, Any]:
    """Means and quantiles, the exact posterior's by re-weighting, the difference at equal noise, and the rise.

    The rise is None where the prior's scores do not vary. Without samples of a prior there is only the posterior's side, without
    weights, which are then NaN, no re-weighted one.

    Args:
        prior: With scores, the reward's or a judge's, as `reward`.
        posterior: The same.
        log_w: beta·r of the prior's samples; nats.
        config: Of intervals.
    """
    means = side_means(prior, posterior, log_w, config)
    quantiles = {
        "prior": _quantiles(prior, config) if means["prior"] else None,
        "posterior": _quantiles(posterior, config),
        "reweighted_prior": _quantiles(prior, config, log_w) if means["reweighted_prior"] else None,
    }
    found = means | {"quantiles": quantiles, "rise_in_prior_std": None}
    return found if not len(prior) else found | _rise(prior, posterior, means, config)


def paired_difference(prior: Drawn, posterior: Drawn, confidence: float, n: int) -> tuple[Interval, int]:
    """Mean over prompts of r(posterior) - r(prior) of samples that start from the same noise, with its bootstrap interval.

    Samples of a prompt with the same `index` are a pair; pairs are resampled within prompts. What both owe to their noise cancels,
    so it is narrower than two intervals of means. The second answer is the fewest pairs of a prompt.

    Raises:
        ValueError: there is no pair.
    """
    before, after = _by_index(prior), _by_index(posterior)
    both = [key for key in after if key in before]
    if not both:
        raise ValueError(
            "A paired difference needs samples of the same prompts and indices on both sides: there are none."
        )
    differences = torch.tensor([after[key] - before[key] for key in both], dtype=torch.float64)
    groups = torch.tensor([row for row, _ in both])
    return bootstrap_interval(differences, confidence, n, groups=groups), int(
        groups.unique(return_counts=True)[1].min()
    )


def _by_index(drawn: Drawn) -> dict[tuple[int, int], float]:
    """Reward by prompt and index; without an index nobody knows which noise a sample came from."""
    index = [] if drawn.index is None else drawn.index.tolist()
    keys = zip(drawn.prompt.tolist(), index, strict=False)
    return dict(zip(keys, drawn.reward.double().tolist(), strict=False))


def _rise(prior: Drawn, posterior: Drawn, means: dict[str, Any], config: EvalConfig) -> dict[str, Any]:
    paired = None
    if prior.index is not None and posterior.index is not None:
        found, pairs = paired_difference(prior, posterior, config.confidence, config.bootstrap)
        paired = asdict(found) | {"pairs": pairs}
    rise = means["posterior"]["mean"] - means["prior"]["mean"]
    std = float(prior.reward.double().std(correction=0))
    within = within_prompts(lambda v: float(v.var(correction=0)), prior.reward, prior.prompt) ** 0.5
    return {
        "paired_difference": paired,
        "prior_std": std,
        "rise_in_prior_std": rise / std if std > 0 else None,
        "rise_in_within_prompt_std": rise / within if within > 0 else None,
    }


def _quantiles(drawn: Drawn, config: EvalConfig, log_w: Tensor | None = None) -> dict[str, dict[str, float]]:
    """By their share."""
    asked = (QUANTILES, config.confidence, config.bootstrap)
    found = quantile_intervals(drawn.reward, *asked, groups=drawn.prompt, log_w=log_w)
    return {f"{share:g}": asdict(each) for share, each in zip(QUANTILES, found, strict=True)}
