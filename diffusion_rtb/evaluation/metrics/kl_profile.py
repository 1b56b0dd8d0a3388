"""Which steps of the chain the KL to the prior lies in."""

from __future__ import annotations

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import kl_profile
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["KLProfile"]


class KLProfile(Metric):
    """E_q[log_q - log_p] of each step; sums to the KL."""

    name, unit = "kl_profile", "nats"
    needs = "log_densities"

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> list[float]:
        """One number per step."""
        profile: list[float] = kl_profile(*posterior.densities).tolist()
        return profile
