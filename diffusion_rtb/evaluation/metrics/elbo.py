"""The lower bound on log Z that training raises."""

from __future__ import annotations

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import elbo
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["ELBO"]


class ELBO(Metric):
    """E_q[beta·r - (log_q - log_p)] <= log Z, with equality at the exact posterior."""

    name, unit, columns = "elbo", "nats", ("ELBO",)
    needs = ("log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> float:
        """Mean over prompts."""
        return elbo(posterior.log_weights(beta), posterior.prompt)
