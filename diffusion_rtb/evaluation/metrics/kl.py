"""What the posterior cost: KL(q || p) over whole trajectories."""

from __future__ import annotations

from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import kl, log_z_from_prior, reweighted_mean, standard_error
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["KL"]


class KL(Metric):
    """KL to the prior, and what the exact posterior's would be."""

    name, unit, columns = "kl", "nats", ("KL",)
    needs = ("prior", "log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, float]:
        """Mean, one standard error, and the exact posterior's by log p*/p = beta·r - log Z."""
        log_q, log_p = posterior.densities
        log_w = beta * prior.reward.double()
        exact = beta * reweighted_mean(prior.reward, log_w, prior.prompt)
        return {
            "mean": kl(log_q, log_p, posterior.prompt),
            "standard_error": standard_error((log_q.double() - log_p.double()).sum(1), posterior.prompt),
            "reweighted_prior": exact - log_z_from_prior(prior.reward, beta, prior.prompt),
        }

    def row(self, value: Any) -> tuple[str, ...]:
        """Mean and standard error."""
        error = value["standard_error"]
        return (f"{value['mean']:.2f} ± {'?' if error is None else f'{error:.2f}'}",)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """The prior's own is 0."""
        return {"KL to the prior (nats)": {"prior": 0.0, "posterior": value["mean"]}}
