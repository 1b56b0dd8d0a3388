"""Compare prior and posterior at the same prompts and seeds; numbers only, `evaluate.py` shows and writes them.

Everything is estimated from two sets of samples: the prior's x ~ p, and the posterior's trajectories with log_q and log_p. The
prior's, weighted by exp(beta·r) within each prompt, are samples of the exact posterior and say what the tuned model should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.estimates import (
    elbo,
    ess,
    kl,
    kl_profile,
    log_weights,
    log_z_importance,
    reweighted_mean,
    standard_error,
    within_prompts,
)
from diffusion_rtb.evaluation.bootstrap import bootstrap_interval
from diffusion_rtb.evaluation.diversity import mean_pairwise_cosine_distance, vendi_score
from diffusion_rtb.evaluation.jackknife import log_z_with_error
from diffusion_rtb.evaluation.posterior_check import check_posterior
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["summarise"]


def summarise(
    prior: Drawn, posterior: Drawn, prompts: Sequence[str], beta: float, config: EvalConfig
) -> dict[str, Any]:
    """All numbers of the evaluation as plain JSON values.

    `overall` gives every prompt the same say; `per_prompt` holds the same numbers for each. The rise of the reward is
    stated in the prior's standard deviation over all its samples (`rise_in_prior_std`) and in its root mean square
    deviation within a prompt (`rise_in_within_prompt_std`). What cannot be estimated from so few samples is None.
    """
    numbers = {
        "beta": beta,
        "samples": {"prior": len(prior.reward) // len(prompts), "posterior": len(posterior.reward) // len(prompts)},
        "overall": _numbers(prior, posterior, beta, config),
        "per_prompt": [
            {"prompt": text} | _numbers(prior.of(row), posterior.of(row), beta, config)
            for row, text in enumerate(prompts)
        ],
        "posterior_check": [_check(prior, posterior, beta, config, factor) for factor in range(len(config.factors))],
    }
    return {key: _plain(value) for key, value in numbers.items()}


def _plain(value: Any) -> Any:
    """The same for JSON, which has no NaN: what could not be estimated (one sample has no spread) is None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
    assert posterior.log_q is not None
    assert posterior.log_p is not None
    log_q, log_p = posterior.log_q, posterior.log_p
    log_w = log_weights(posterior.reward, log_q, log_p, beta)
    log_ratio = (log_q.double() - log_p.double()).sum(1)
    reward = _reward(prior, posterior, beta, config)
    log_z = log_z_with_error(prior.reward, beta, prior.prompt, config.confidence)
    return {
        "reward": reward,
        "kl": {
            "mean": kl(log_q, log_p, posterior.prompt),
            "standard_error": standard_error(log_ratio, posterior.prompt),
            # What the exact posterior's would be: log p*/p = beta·r - log Z.
            "reweighted_prior": beta * reward["reweighted_prior"] - log_z.estimate,
        },
        "kl_profile": kl_profile(log_q, log_p).tolist(),
        "elbo": elbo(posterior.reward, log_q, log_p, beta, posterior.prompt),
        "log_z": {
            "from_posterior": log_z_importance(log_w, posterior.prompt),
            "from_prior": log_z.estimate,
            "from_prior_low": log_z.low,
            "from_prior_high": log_z.high,
            "from_prior_bias": log_z.bias,
            "effective_prior_samples": log_z.effective,
        },
        "ess": {
            "posterior": ess(log_w, posterior.prompt),
            "prior": ess(beta * prior.reward.double(), prior.prompt),
        },
        "diversity": _diversity(prior, posterior, beta),
    }


def _reward(prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
    def interval(drawn: Drawn) -> dict[str, float]:
        confidence, n = config.confidence, config.bootstrap
        return asdict(bootstrap_interval(drawn.reward.double(), confidence, n, groups=drawn.prompt))

    before, after = interval(prior), interval(posterior)
    rise = after["mean"] - before["mean"]
    std = float(prior.reward.double().std(correction=0))
    within = within_prompts(lambda v: float(v.var(correction=0)), prior.reward, prior.prompt) ** 0.5
    return {
        "prior": before,
        "posterior": after,
        "reweighted_prior": reweighted_mean(prior.reward, beta * prior.reward.double(), prior.prompt),
        "prior_std": std,
        "rise_in_prior_std": rise / std if std > 0 else None,
        "rise_in_within_prompt_std": rise / within if within > 0 else None,
    }


def _diversity(prior: Drawn, posterior: Drawn, beta: float) -> dict[str, Any] | None:
    """Within-prompt diversity in the embedding space, mean over prompts; None without embeddings or with single samples.

    All three use equally many samples, because Vendi scores grow with their number. The weights of the re-weighted prior
    are uneven, so its Vendi score errs low: by how much, its ESS says.
    """
    if prior.embedding is None or posterior.embedding is None:
        return None
    prompts = posterior.prompt.unique().tolist()
    count = min(int((d.prompt == row).sum()) for d in (prior, posterior) for row in prompts)
    if count < 2:
        return None
    before, after = prior.first(count), posterior.first(count)
    rows: dict[str, list[tuple[float, float]]] = {"prior": [], "posterior": [], "reweighted_prior": []}
    for row in prompts:
        one, other = before.of(row), after.of(row)
        weights = torch.softmax(beta * one.reward.double(), 0)
        for name, drawn, w in (("prior", one, None), ("posterior", other, None), ("reweighted_prior", one, weights)):
            assert drawn.embedding is not None
            e = drawn.embedding
            rows[name].append((mean_pairwise_cosine_distance(e, w), vendi_score(e, w)))
    return {
        name: {
            "pairwise_cosine_distance": sum(d for d, _ in found) / len(found),
            "vendi": sum(v for _, v in found) / len(found),
        }
        for name, found in rows.items()
    }


def _check(prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig, index: int) -> dict[str, Any]:
    factor = config.factors[index]
    assert prior.labels is not None
    assert posterior.labels is not None
    found = check_posterior(
        factor.name,
        factor.labels or factor.classes,
        prior=(prior.labels[:, index], prior.prompt),
        log_w=beta * prior.reward.double(),
        posterior=(posterior.labels[:, index], posterior.prompt),
        confidence=config.confidence,
        bootstrap=config.bootstrap,
    )
    return asdict(found) | {"passed": found.passed}
