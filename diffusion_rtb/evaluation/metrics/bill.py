"""Where the bill goes: the KL to the prior, split into what the exact posterior would need and the rest, and into steps."""

from __future__ import annotations

from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import kl, kl_profile
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics.kl import exact_kl
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["Bill", "last_steps"]


class Bill(Metric):
    """KL(q || p), what of it the exact posterior would need, and the share of the last steps."""

    name, unit = "bill", "nats"
    needs = ("prior", "log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """Totals in nats; `exact_per_step` is that of the exact posterior through the same chain, None where nobody knows it.

        `needed` comes from re-weighted prior samples and says nothing of steps. The last steps are the last fifth, whose
        even share would be a fifth.
        """
        log_q, log_p = posterior.densities
        paid = kl(log_q, log_p, posterior.prompt)
        needed = exact_kl(prior.reward, beta, prior.prompt, config.confidence, config.bootstrap).mean
        profile, last, exact = kl_profile(log_q, log_p), last_steps(log_q.shape[1]), posterior.exact_profile
        return {
            "paid": paid,
            "needed": needed,
            "rest": paid - needed,
            "steps": len(profile),
            "last_steps": last,
            "last_share": float(profile[-last:].sum() / profile.sum()),
            "exact_per_step": None if exact is None else exact.tolist(),
            "exact_last_share": None if exact is None else float(exact[-last:].sum() / exact.sum()),
        }

    def sentence(self, value: Any, beta: float) -> str:
        """What it pays, what would do, and how much of it goes to the last steps."""
        last, share, exact = value["last_steps"], value["last_share"], value["exact_last_share"]
        text = f"Pays {value['paid']:.3g} nats where {value['needed']:.3g} would do"
        if share is None or value["paid"] <= 0:
            return f"{text}."
        known = "" if exact is None else f", where the exact posterior has {exact:.0%}"
        return f"{text}; {share:.0%} of it in the last {last} of {value['steps']} steps{known}."


def last_steps(steps: int) -> int:
    """How many of a chain's steps are its last ones: a fifth, at least one."""
    return max(1, round(steps / 5))
