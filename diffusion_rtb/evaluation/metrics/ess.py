"""How even the importance weights are."""

from __future__ import annotations

from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import ess
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["ESS"]


class ESS(Metric):
    """Effective sample size as a share: of posterior trajectories (1: exact), and of prior samples weighted by exp(beta·r)."""

    name = "ess"
    needs = ("prior", "log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, float]:
        """Both shares, in (0, 1]."""
        log_w = posterior.log_weights(beta)
        return {
            "posterior": ess(log_w, posterior.prompt),
            "prior": ess(beta * prior.reward.double(), prior.prompt),
        }

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Both: that of prior samples is how well the re-weighted prior is known."""
        return {"effective sample size": {"reweighted_prior": value["prior"], "posterior": value["posterior"]}}
