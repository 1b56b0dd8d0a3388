r"""What held-out judges say: rewards that training did not see, and that rise with it unless it was hacked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics.reward import of_scores
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["JudgesMetric", "correlation_within"]


class JudgesMetric(Metric):
    """Of each judge what the metric `reward` says of the reward, and how its scores go with the reward.

    The re-weighted prior is weighted by the reward that was trained on, exp(beta·r): what a perfect posterior scores.
    """

    name, needs = "judges", "judges"

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, dict[str, Any]]:
        """Judge -> its numbers."""
        return {name: _judge(name, prior, posterior, beta, config) for name in posterior.judges or {}}

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """The means of each with their intervals."""
        sides = ("prior", "reweighted_prior", "posterior")
        return {f"judge {name}": {side: found[side] for side in sides} for name, found in value.items()}


def _judge(name: str, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
    sides = {"prior": prior, "posterior": posterior}
    scored = {
        side: replace(drawn, reward=drawn.judges[name]) if drawn.judges else drawn for side, drawn in sides.items()
    }
    found = of_scores(scored["prior"], scored["posterior"], beta * prior.reward.double(), config)
    correlation = {
        side: correlation_within(scored[side].reward, drawn.reward, drawn.prompt) if len(drawn) else None
        for side, drawn in sides.items()
    }
    return found | {"correlation": correlation}


def correlation_within(
    a: Float[Tensor, " batch"], b: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]
) -> float | None:
    """Pearson's correlation of two scores, the mean of each sample's own prompt removed, in [-1, 1]; None where one is constant."""
    rest = []
    for values in (a, b):
        v = values.detach().double().clone()
        for row in prompt.unique().tolist():
            v[prompt == row] -= v[prompt == row].mean()
        rest.append(v)
    scale = torch.linalg.vector_norm(rest[0]) * torch.linalg.vector_norm(rest[1])
    # Numbers that are all alike leave nothing but the rounding of their mean.
    size = min(float(r.abs().max()) / max(float(v.abs().max()), 1e-300) for r, v in zip(rest, (a, b), strict=True))
    return None if size < 1e-7 else float(rest[0] @ rest[1] / scale)
