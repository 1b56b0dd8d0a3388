"""How loudly the posterior's network answers, beside the prior's at the same states."""

from __future__ import annotations

from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import norm_ratio
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["NormRatio"]


class NormRatio(Metric):
    """|e_q| / |e_p| of each step, on the posterior's own states; 1 as long as nothing is trained."""

    name, needs = "norm_ratio", "log_densities"

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any] | None:
        """Per step (None without a density), mean over steps, and the highest with its step; None where no norms are known."""
        if posterior.norm_q is None or posterior.norm_p is None:
            return None
        ratio = norm_ratio(posterior.norm_q, posterior.norm_p, posterior.prompt)
        highest = int(ratio.nan_to_num(-1.0).argmax())
        return {
            "mean": float(ratio.nanmean()),
            "highest": float(ratio[highest]),
            "highest_step": highest,
            "per_step": ratio.tolist(),
        }

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """The prior's own is 1."""
        return {"norm ratio": {"prior": 1.0, "posterior": value["mean"]}}
