r"""How much of the tilt that was asked for is there, and how much else the chain did.

At the exact posterior log q - log p = beta·r - log Z of every trajectory: regressed on beta·r, the slope is 1 and nothing is left.
A posterior on its way there has a slope below 1, one that went past it above; what a reward does not explain, 1 - r², was paid
for without a reward.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import VAGUE, achieved_strength, strength_error, tilt_moments
from diffusion_rtb.evaluation.bootstrap import Interval, percentile_interval, resampled_means
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["AchievedStrength", "strength_interval"]


class AchievedStrength(Metric):
    """Slope of log q - log p on beta·r within prompts, with its interval, and r²: `estimates.achieved_strength`."""

    name, columns = "strength", ("strength",)
    needs = ("log_densities", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """Slope, the beta that this is, and r²; what a prior has and what a perfect model would.

        Without a slope, or with one that tells nothing (`VAGUE`), it says why.
        """
        log_q, log_p = posterior.densities
        ratio = (log_q.double() - log_p.double()).sum(1)
        slope, r2 = achieved_strength(ratio, posterior.reward, beta, posterior.prompt)
        if slope != slope:
            return {"slope": None, "r2": None, "why": _why(posterior)}
        if (error := strength_error(ratio, posterior.reward, beta, posterior.prompt)) > VAGUE:
            return {"slope": None, "r2": None, "why": _vague(slope, error, ratio, posterior, beta)}
        groups = (posterior.reward.double(), posterior.prompt, config.confidence, config.bootstrap)
        interval = strength_interval(slope, ratio, beta, *groups)
        return {
            "slope": asdict(interval),
            "r2": r2,
            "beta_achieved": beta * slope,
            "prior": 0.0,
            "reweighted_prior": 1.0,
        }

    def row(self, value: Any) -> tuple[str, ...]:
        """The slope."""
        return ("-" if value["slope"] is None else f"{value['slope']['mean']:.2f}",)

    def sentence(self, value: Any, beta: float) -> str:
        """Asked for, got."""
        slope, r2 = value["slope"], value["r2"]
        if slope is None:
            return f"Achieved strength: unknown, as {value['why']}."
        low, high = (beta * slope[end] if slope[end] is not None else None for end in ("low", "high"))
        interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
        other = (
            "nothing has moved"
            if r2 is None
            else f"{1 - r2:.0%} of what the chain moved has other reasons than the reward"
        )
        return f"Asked for beta {beta:.3g}, got {value['beta_achieved']:.3g}{interval}, a strength of {slope['mean']:.2f}; {other}."

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """A prior has none of it, a perfect model all."""
        row = {"prior": 0.0, "reweighted_prior": 1.0, "posterior": value["slope"]}
        return {"achieved strength": row}


def _why(posterior: Drawn) -> str:
    counts = torch.bincount(posterior.prompt)
    if int(counts.max()) < 2:
        return "one sample per prompt has nothing to be compared with (eval.samples)"
    return "the rewards of a prompt's samples are all the same"


def _vague(slope: float, error: float, ratio: Float[Tensor, " batch"], posterior: Drawn, beta: float) -> str:
    _, _, variance, spread = tilt_moments(ratio, posterior.reward.double(), posterior.prompt).tolist()
    return (
        f"within a prompt beta·r spreads over {beta * variance**0.5:.2g} nats and log q - log p over {spread**0.5:.2g}, so that "
        f"{slope:.3g} ± {error:.2g} does not tell none of the tilt from all of it; see whether rewards differ, or draw more"
    )


def strength_interval(
    slope: float,
    log_ratio: Float[Tensor, " batch"],
    beta: float,
    reward: Float[Tensor, " batch"],
    prompt: Int[Tensor, " batch"],
    confidence: float,
    n: int,
) -> Interval:
    """Percentile bootstrap interval of the slope, trajectories resampled within prompts.

    Args:
        slope: The estimate.
        log_ratio: log_q - log_p of posterior trajectories; nats.
        beta: nats per unit of reward.
        reward: Of each.
        prompt: Of each.
        confidence: In (0, 1).
        n: Replicates; one that draws the same reward only has no slope and does not count.
    """
    centred = []
    for values in (log_ratio.double(), reward.double()):
        own = {row: values[prompt == row].mean() for row in prompt.unique().tolist()}
        centred.append(values - torch.stack([own[row] for row in prompt.tolist()]))
    ratio, r = centred
    means = resampled_means(torch.stack([ratio, r, ratio * r, r * r], dim=1), prompt, n)
    ratio, r, both, square = means.unbind(-1)
    covariance, variance = (both - ratio * r).mean(0), (square - r * r).mean(0)
    return percentile_interval(slope, torch.where(variance > 0, covariance / (beta * variance), torch.nan), confidence)
