"""Compare prior and posterior at the same prompts and seeds; numbers only, `evaluate.py` shows and writes them.

Everything is estimated from two sets of samples: the prior's x ~ p, and the posterior's trajectories with log_q and log_p. The
prior's, weighted by exp(beta·r) within each prompt, are samples of the exact posterior and say what the tuned model should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["summarise"]


def summarise(
    prior: Drawn, posterior: Drawn, prompts: Sequence[str], beta: float, config: EvalConfig, metrics: Sequence[Metric]
) -> dict[str, Any]:
    """All numbers of the evaluation as plain JSON values.

    `overall` gives every prompt the same say; `per_prompt` holds the same numbers for each. What cannot be estimated from so few
    samples is None.
    """

    def numbers(one: Drawn, other: Drawn, *, per_prompt: bool = True) -> dict[str, Any]:
        return {m.name: _value(m, one, other, beta, config) for m in metrics if m.per_prompt == per_prompt}

    return {
        "beta": beta,
        "samples": {"prior": len(prior) // len(prompts), "posterior": len(posterior) // len(prompts)},
        "overall": numbers(prior, posterior),
        "per_prompt": [
            {"prompt": text} | numbers(prior.of(row), posterior.of(row)) for row, text in enumerate(prompts)
        ],
    } | numbers(prior, posterior, per_prompt=False)


def _value(metric: Metric, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> Any:
    missing = metric.needs is not None and any(getattr(side, metric.needs) is None for side in (prior, posterior))
    return None if missing else _plain(metric.of(prior, posterior, beta, config))


def _plain(value: Any) -> Any:
    """The same for JSON, which has no NaN: what could not be estimated (one sample has no spread) is None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
