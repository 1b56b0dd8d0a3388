"""Compare prior and posterior at the same prompts and seeds; numbers only, `evaluate.py` shows and writes them.

Everything is estimated from two sets of samples: the prior's x ~ p, and the posterior's trajectories with log_q and log_p. The
prior's, weighted by exp(beta·r) within each prompt, are samples of the exact posterior and say what the tuned model should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric, missing
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["summarise"]


def summarise(
    prior: Drawn,
    posterior: Drawn,
    prompts: Sequence[str],
    beta: float,
    config: EvalConfig,
    metrics: Sequence[Metric],
    *,
    sampled: bool = True,
) -> dict[str, Any]:
    """All numbers of the evaluation as plain JSON values.

    `overall` gives every prompt the same say; `per_prompt` holds the same numbers for each. What cannot be estimated from so few
    samples is None, or needs what is not there; `left_out` says which. `sampled`: drawn here, not made elsewhere.
    """
    left_out: dict[str, str] = {}

    def numbers(one: Drawn, other: Drawn, *, per_prompt: bool = True) -> dict[str, Any]:
        found = {}
        for metric in metrics:
            if metric.per_prompt == per_prompt:
                why = missing(metric, one, other, beta, sampled=sampled)
                found[metric.name] = None if why else _plain(metric.of(one, other, beta, config))
                if found[metric.name] is None and one is prior:
                    left_out[metric.name] = why or f"it cannot be estimated from so few samples: {_counted(counts)}"
        return found

    counts = _counts(prior, posterior, len(prompts))
    whole = {
        "beta": beta if math.isfinite(beta) else None,
        "samples": counts,
        "judges": list(posterior.judges or {}),
        "overall": numbers(prior, posterior),
        "per_prompt": [_row(text, prior.of(row), posterior.of(row), numbers) for row, text in enumerate(prompts)],
    } | numbers(prior, posterior, per_prompt=False)
    return whole | {"left_out": [{"metric": name, "why": why} for name, why in left_out.items()]}


def _row(
    text: str, prior: Drawn, posterior: Drawn, numbers: Callable[[Drawn, Drawn], dict[str, Any]]
) -> dict[str, Any]:
    return {"prompt": text, "samples": _counts(prior, posterior, 1)} | numbers(prior, posterior)


def _counts(prior: Drawn, posterior: Drawn, prompts: int) -> dict[str, int]:
    """Samples of a prompt on each side, of several prompts the smallest number of all."""
    return {name: min(_per_prompt(side, prompts)) for name, side in (("prior", prior), ("posterior", posterior))}


def _per_prompt(side: Drawn, prompts: int) -> list[int]:
    return [len(side)] if prompts == 1 else torch.bincount(side.prompt, minlength=prompts).tolist()


def _counted(counts: Mapping[str, int]) -> str:
    return f"{counts['prior']} of the prior and {counts['posterior']} of the posterior for a prompt"


def _plain(value: Any) -> Any:
    """The same for JSON, which has no NaN: what could not be estimated (one sample has no spread) is None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
