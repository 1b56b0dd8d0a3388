r"""Is it the posterior, or only a higher reward? Class shares of the tuned model against the exactly re-weighted prior.

Prior samples weighted by exp(beta·r) within each prompt are samples of p*(x) = p(x)·exp(beta·r(x)) / Z, whatever the
trained model does. For every factor of the pictures that the prompts leave open (background, style, …) a judge names the
class of each picture; the posterior is right when its class shares equal those of the re-weighted prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.estimates import reweighted_shares, total_variation
from diffusion_rtb.evaluation.bootstrap import Interval, check_bootstrap, resampled_counts
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["PosteriorCheckMetric", "check_posterior"]


class PosteriorCheckMetric(Metric):
    """One `PosteriorCheck` for each factor that the judge tells apart."""

    name, per_prompt = "posterior_check", False
    needs = ("prior", "beta")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> list[dict[str, Any]]:
        """A check per factor; none without factors."""
        return [_check(prior, posterior, beta, config, index) for index in range(len(config.factors))]


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


@dataclass(frozen=True)
class PosteriorCheck:
    """The answer for one factor; shares are means over prompts of within-prompt shares."""

    factor: str
    labels: tuple[str, ...]
    prior: tuple[float, ...]
    """Share of each class among the prior's samples."""
    reweighted: tuple[float, ...]
    """The same samples weighted by exp(beta·r): what the posterior should show."""
    posterior: tuple[float, ...]
    prior_interval: tuple[tuple[float, float], ...]
    """Bootstrap interval of each share of `prior`, (low, high); the other two likewise."""
    reweighted_interval: tuple[tuple[float, float], ...]
    posterior_interval: tuple[tuple[float, float], ...]
    tv: Interval
    """Total variation between `posterior` and `reweighted`, with its confidence interval."""
    tv_prior: float
    """Total variation between `prior` and `reweighted`: what an untrained model would score."""
    noise: Interval
    """Total variation that sampling alone produces when both are equal: mean, and the interval it falls into."""
    p_value: float
    """Share of sampling noise at least as large as `tv`: small means a real difference."""
    tv_within: float
    """Mean over prompts of the total variation within the prompt; sampling noise alone gives `noise_within`."""
    noise_within: float
    missing: tuple[str, ...]
    """Classes whose re-weighted share exceeds `missing_above` that the posterior never produced."""
    missing_above: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Total variation within the tolerance and no sizeable class lost."""
        return self.tv.mean <= self.tolerance and not self.missing


def check_posterior(
    factor: str,
    labels: Sequence[str],
    *,
    prior: tuple[Int[Tensor, " n"], Int[Tensor, " n"]],
    log_w: Float[Tensor, " n"],
    posterior: tuple[Int[Tensor, " m"], Int[Tensor, " m"]],
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    tolerance: float = 0.10,
    missing_above: float = 0.05,
) -> PosteriorCheck:
    r"""Compare the posterior's class shares q with the re-weighted prior's p.

    With e the bootstrap deviation of q − p from its observed value, ½·sum |e| is the distance that sampling noise
    alone produces (`noise`). By the triangle inequality the true distance is at least tv − noise, which is the interval's
    low end (a percentile interval of a distance never reaches 0); its high end is the percentile of ½·sum |q − p + e|,
    which errs on the large side. Noise that both share through common seeds is counted twice: also on the large side.

    Args:
        factor: name of the factor, e.g. "style".
        labels: name of each class.
        prior: class and prompt of each prior sample.
        log_w: beta·r of each prior sample, nats.
        posterior: class and prompt of each posterior sample.
        confidence: of the interval, in (0, 1).
        bootstrap: number of replicates.
        seed: of the resampling.
        tolerance: largest total variation that passes.
        missing_above: re-weighted share above which a class may not be missing.

    Raises:
        ValueError: prior and posterior cover different prompts, or an argument is out of range.
    """
    check_bootstrap(confidence, bootstrap)
    _check_prompts(prior[1], posterior[1])
    generator = torch.Generator().manual_seed(seed)
    k, even = len(labels), torch.zeros(len(posterior[0]))
    raw = reweighted_shares(prior[0], k, None, prior[1]).mean(0)
    p = reweighted_shares(prior[0], k, log_w, prior[1])
    q = reweighted_shares(posterior[0], k, None, posterior[1])
    p_again = _replicates(prior[0], k, log_w, prior[1], bootstrap, generator)
    q_again = _replicates(posterior[0], k, even, posterior[1], bootstrap, generator)
    raw_again = _replicates(prior[0], k, torch.zeros(len(prior[0])), prior[1], bootstrap, generator)
    e = p - p_again + (q_again - q)
    noise = _half_norm(e.mean(1))
    tv, spread = _intervals((q - p).mean(0), e.mean(1), confidence)
    wanted = p.mean(0)
    return PosteriorCheck(
        factor=factor,
        labels=tuple(labels),
        prior=tuple(raw.tolist()),
        reweighted=tuple(wanted.tolist()),
        posterior=tuple(q.mean(0).tolist()),
        prior_interval=_ends(raw_again, confidence),
        reweighted_interval=_ends(p_again, confidence),
        posterior_interval=_ends(q_again, confidence),
        tv=tv,
        tv_prior=total_variation(raw, wanted),
        noise=spread,
        p_value=(1 + int((noise >= tv.mean).sum())) / (1 + bootstrap),
        tv_within=float(_half_norm(q - p).mean()),
        noise_within=float(_half_norm(e).mean()),
        missing=tuple(labels[i] for i in range(k) if wanted[i] > missing_above and i not in posterior[0]),
        missing_above=missing_above,
        tolerance=tolerance,
    )


def _check_prompts(prior: Tensor, posterior: Tensor) -> None:
    if not torch.equal(prior.unique(), posterior.unique()):
        rows = f"{prior.unique().tolist()} and {posterior.unique().tolist()}"
        raise ValueError(f"Prior and posterior samples must cover the same prompts, got rows {rows}.")


def _half_norm(difference: Tensor) -> Tensor:
    """½·sum |difference| over classes: the total variation of two distributions that differ by it."""
    return 0.5 * difference.abs().sum(-1)


def _intervals(d: Tensor, e: Tensor, confidence: float) -> tuple[Interval, Interval]:
    """Of the distance of two distributions that differ by d (classes,), and of what noise e (n, classes) alone makes of 0."""
    tv, noise, shifted = min(1.0, float(_half_norm(d))), _half_norm(e), _half_norm(d + e)
    tail = (1.0 - confidence) / 2
    low, high = tv - float(noise.quantile(confidence)), float(shifted.quantile(1.0 - tail))
    around_zero = Interval(float(noise.mean()), float(noise.quantile(tail)), float(noise.quantile(1.0 - tail)))
    return Interval(tv, max(0.0, low), min(1.0, max(tv, high))), around_zero


def _ends(replicates: Float[Tensor, "n prompts classes"], confidence: float) -> tuple[tuple[float, float], ...]:
    """Percentile interval of each class's share, mean over prompts."""
    tail = (1.0 - confidence) / 2
    ends = replicates.mean(1).quantile(torch.tensor([tail, 1.0 - tail], dtype=replicates.dtype), dim=0)
    return tuple((float(low), float(high)) for low, high in ends.T)


def _replicates(
    labels: Tensor, classes: int, log_w: Tensor, prompt: Tensor, n: int, generator: torch.Generator
) -> Float[Tensor, "n prompts classes"]:
    """Bootstrap replicates of `reweighted_shares`, resampled within each prompt."""
    shares = []
    for row in prompt.unique().tolist():
        rows = prompt == row
        weights = torch.softmax(log_w[rows].double(), 0)[:, None]
        one_hot = torch.nn.functional.one_hot(labels[rows], classes).double()
        drawn = resampled_counts(int(rows.sum()), n, generator) @ (weights * one_hot)
        # A replicate may miss every sample that carries weight; its shares are then 0 rather than NaN.
        shares.append(drawn / drawn.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack(shares, dim=1)
