"""Mean reward of prior, posterior and re-weighted prior, with intervals, and its rise."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import reweighted_mean, within_prompts
from diffusion_rtb.evaluation.bootstrap import bootstrap_interval
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["RewardMetric"]


class RewardMetric(Metric):
    """The rise is stated in the prior's standard deviation over all its samples and in its deviation within a prompt."""

    name, needs = "reward", None

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """Means, the exact posterior's by re-weighting, and the rise; None where the prior's rewards do not vary.

        Without samples of a prior there is the posterior's own mean, without a beta no re-weighted one.
        """
        after = _interval(posterior, config)
        if not len(prior):
            return {"prior": None, "posterior": after, "reweighted_prior": None, "rise_in_prior_std": None}
        before = _interval(prior, config)
        rise = after["mean"] - before["mean"]
        std = float(prior.reward.double().std(correction=0))
        within = within_prompts(lambda v: float(v.var(correction=0)), prior.reward, prior.prompt) ** 0.5
        return {
            "prior": before,
            "posterior": after,
            "reweighted_prior": reweighted_mean(prior.reward, beta * prior.reward.double(), prior.prompt)
            if math.isfinite(beta)
            else None,
            "prior_std": std,
            "rise_in_prior_std": rise / std if std > 0 else None,
            "rise_in_within_prompt_std": rise / within if within > 0 else None,
        }

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Both means with their intervals."""
        return {"reward": {"prior": value["prior"], "posterior": value["posterior"]}}


def _interval(drawn: Drawn, config: EvalConfig) -> dict[str, float]:
    confidence, n = config.confidence, config.bootstrap
    return asdict(bootstrap_interval(drawn.reward.double(), confidence, n, groups=drawn.prompt))
