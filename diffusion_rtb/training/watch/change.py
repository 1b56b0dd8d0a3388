r"""What has changed between prior and posterior at the same prompts and seeds, how surely, and whether that is beyond the band.

Differences are paired: sample i of both sides began at the same noise, so what is luck of the draw cancels. A change counts
where it is larger than its band AND than twice its standard error, so that few samples make the alarm dull and not nervous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.config.watch.section import Bands
from diffusion_rtb.estimates import standard_error, within_prompts

if TYPE_CHECKING:
    from diffusion_rtb.training.watch.look import Look

__all__ = ["ERRORS", "Change", "Verdict", "mean", "verdict"]

ERRORS = 2.0
"""Standard errors that a change must exceed besides its band."""

NONE = 1e-9
"""A mean cosine distance that is rounding."""


@dataclass(frozen=True)
class Change:
    """One measure, prior against posterior."""

    kind: str
    """"reward", "judge", "diversity" or "norm_ratio"."""
    name: str
    before: float
    """Of the prior, in the measure's own unit."""
    now: float
    """Of the posterior."""
    size: float
    """In the unit of the band; positive is the direction that counts: the reward up, judges and diversity down, the norm up."""
    error: float
    """One standard error of `size`; NaN where nothing can be said."""
    band: float

    @property
    def beyond(self) -> bool:
        """Larger than the band and than `ERRORS` of its standard errors; never where those are unknown."""
        return self.size > self.band and self.size > ERRORS * self.error


@dataclass(frozen=True)
class Verdict:
    """What a look at the posterior says beside that at the prior."""

    rise: Change
    """Of the training reward."""
    others: tuple[Change, ...]
    """Of the judges, the diversity and the norm."""

    @property
    def wrong(self) -> tuple[Change, ...]:
        """What makes it an alarm; empty: it is none."""
        return tuple(change for change in self.others if change.beyond) if self.rise.beyond else ()


def verdict(prior: Look, posterior: Look, bands: Bands) -> Verdict:
    """Compare two looks at the same prompts and seeds."""
    rise = _scores("reward", "reward", prior.reward, posterior.reward, prior.prompt, bands.reward, sign=1.0)
    return Verdict(rise, tuple(_others(prior, posterior, bands)))


def _others(prior: Look, posterior: Look, bands: Bands) -> Iterator[Change]:
    for name, before in prior.judges.items():
        yield _scores("judge", name, before, posterior.judges[name], prior.prompt, bands.judge, sign=-1.0)
    if prior.embedding is not None and posterior.embedding is not None:
        yield _diversity(prior.embedding, posterior.embedding, prior.prompt, bands.diversity)
    louder = posterior.loudness - 1.0
    now, error = mean(posterior.loudness, posterior.prompt), standard_error(louder, posterior.prompt)
    yield Change("norm_ratio", "norm ratio", 1.0, now, now - 1.0, error, bands.norm_ratio)


def _scores(
    kind: str, name: str, before: Tensor, now: Tensor, prompt: Int[Tensor, " batch"], band: float, *, sign: float
) -> Change:
    """A change of scores in standard deviations of the prior's within a prompt; NaN, and never beyond a band, where those are 0."""
    before, now = before.double(), now.double()
    spread = math.sqrt(within_prompts(lambda v: float(v.var()), before, prompt))
    difference = sign * (now - before)
    size, error = mean(difference, prompt), standard_error(difference, prompt)
    unit = spread or math.nan
    return Change(kind, name, mean(before, prompt), mean(now, prompt), size / unit, error / unit, band)


def _diversity(
    before: Float[Tensor, "batch features"],
    now: Float[Tensor, "batch features"],
    prompt: Int[Tensor, " batch"],
    band: float,
) -> Change:
    r"""The lost share 1 - D_q / D_p of the mean pairwise cosine distance D, mean over prompts, with the jackknife's standard error.

    Leaving out sample k leaves it out on both sides: var = sum over prompts of (n - 1)/n · sum_k (share_k - mean share)².
    Efron and Stein, "The Jackknife Estimate of Variance", 1981, https://doi.org/10.1214/aos/1176345462
    """
    sides = [[_without_each(side[prompt == row]) for row in prompt.unique().tolist()] for side in (before, now)]
    whole = [sum(d for d, _ in side) / len(side) for side in sides]
    lost = 1.0 - whole[1] / whole[0] if whole[0] > NONE else math.nan
    variance = 0.0
    for (d_p, left_p), (d_q, left_q) in zip(*sides, strict=True):
        count = len(sides[0])
        share = 1.0 - (whole[1] + (left_q - d_q) / count) / (whole[0] + (left_p - d_p) / count)
        n = len(share)
        variance += (n - 1) / n * float((share - share.mean()).square().sum())
    return Change("diversity", "diversity", whole[0], whole[1], lost, math.sqrt(variance), band)


def _without_each(embedding: Float[Tensor, "n features"]) -> tuple[float, Float[Tensor, " n"]]:
    """The mean pairwise cosine distance of n samples, and of the n - 1 that each of them leaves behind."""
    unit = torch.nn.functional.normalize(embedding.double(), dim=1)
    far = (1.0 - unit @ unit.T).clamp_min(0.0).fill_diagonal_(0.0)
    n, total = len(far), far.sum()
    return float(total / (n * (n - 1))), (total - 2 * far.sum(1)) / ((n - 1) * (n - 2))


def mean(values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]) -> float:
    """Mean over prompts of the means within them."""
    return within_prompts(lambda v: float(torch.mean(v)), values, prompt)
