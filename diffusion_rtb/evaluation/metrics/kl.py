"""What the posterior cost: KL(q || p) over whole trajectories, and what the exact posterior would have."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import log_z_from_prior, reweighted_mean, standard_error
from diffusion_rtb.evaluation.bootstrap import Interval, bootstrap_interval, percentile_interval, resampled_means
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["KL", "exact_kl"]


class KL(Metric):
    """KL to the prior, and what the exact posterior's would be."""

    name, unit, columns = "kl", "nats", ("KL",)
    needs = ("prior", "log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """Mean with its interval and one standard error, and the exact posterior's by log p*/p = beta·r - log Z."""
        log_q, log_p = posterior.densities
        ratio = (log_q.double() - log_p.double()).sum(1)
        mean = bootstrap_interval(ratio, config.confidence, config.bootstrap, groups=posterior.prompt)
        exact = exact_kl(prior.reward, beta, prior.prompt, config.confidence, config.bootstrap)
        return asdict(mean) | {
            "standard_error": standard_error(ratio, posterior.prompt),
            "reweighted_prior": asdict(exact),
        }

    def row(self, value: Any) -> tuple[str, ...]:
        """Mean and standard error."""
        error = value["standard_error"]
        return (f"{value['mean']:.2f} ± {'?' if error is None else f'{error:.2f}'}",)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """The prior's own is 0."""
        after = {end: value[end] for end in ("mean", "low", "high")}
        row = {"prior": 0.0, "reweighted_prior": value["reweighted_prior"], "posterior": after}
        return {"KL to the prior (nats)": row}


def exact_kl(
    reward: Float[Tensor, " batch"], beta: float, prompt: Int[Tensor, " batch"], confidence: float, n: int
) -> Interval:
    """KL(p* || p) = beta·E_p*[r] - log Z of the exact posterior, from samples of the prior, with its bootstrap interval; nats.

    Args:
        reward: Of samples of the prior.
        beta: nats per unit of reward.
        prompt: Of each sample.
        confidence: Of the interval, in (0, 1).
        n: Replicates, resampled within prompts.
    """
    r = reward.detach().double().cpu()
    mean = beta * reweighted_mean(r, beta * r, prompt) - log_z_from_prior(r, beta, prompt)
    most = torch.stack([r[prompt == row].max() for row in prompt.unique().tolist()])
    w = (beta * (r - most[torch.unique(prompt, return_inverse=True)[1]])).exp()
    means = resampled_means(torch.stack([w * r, w], dim=1), prompt, n)
    total = means[..., 1].clamp_min(torch.finfo(torch.float64).tiny)
    replicates = beta * (means[..., 0] / total - most[:, None]) - total.log()
    return percentile_interval(mean, replicates.mean(0), confidence)
