"""The verdict in three lines of plain words: better by, at the price of, is it the posterior; from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.report.numbers import Estimate, at, estimate, number, of_samples, text
from diffusion_rtb.report.subject import Subject

__all__ = ["FEW", "NEAR", "Line", "achieved", "difference", "judged", "verdict"]

FEW = 30
"""Effective prior samples per prompt below which intervals of re-weighted numbers are too narrow (`evaluation.metrics.log_z`)."""

NEAR = 0.1
"""Nats between log Z and the ELBO that are called none: a KL of 0.1 is a total variation of at most 0.22 (Pinsker)."""

Tone = Literal["good", "partly", "bad", "unknown"]


@dataclass(frozen=True)
class Line:
    """One question with its short answer and the numbers behind it."""

    question: str
    answer: str
    tone: Tone
    words: str


def verdict(subject: Subject) -> list[Line]:
    """Three lines, each computed from numbers and their intervals."""
    return [_better(subject), _price(subject), _posterior(subject)]


def difference(numbers: Mapping[str, Any]) -> tuple[Estimate | None, bool]:
    """How much higher the posterior's mean reward is than the prior's, and whether pairs of equal seeds said so.

    Without pairs, the two intervals are joined as those of independent means.
    """
    paired = estimate(numbers, "reward", "paired_difference")
    if paired is not None:
        return paired, True
    before, after = estimate(numbers, "reward", "prior"), estimate(numbers, "reward", "posterior")
    if before is None or after is None:
        return None, False
    mean = after.mean - before.mean
    below, above = before.reach, after.reach
    if below is None or above is None:
        return Estimate(mean), False
    return Estimate(mean, mean - math.hypot(above[0], below[1]), mean + math.hypot(above[1], below[0])), False


def achieved(subject: Subject) -> tuple[Estimate, float | None] | None:
    """The share of the asked-for tilt that is there, and r²: how much of what the chain moved is that tilt."""
    share = estimate(subject.overall, "strength", "slope") or estimate(subject.overall, "strength")
    return None if share is None else (share, number(subject.overall, "strength", "r2"))


def judged(subject: Subject) -> Iterator[tuple[str, Estimate | None, Estimate | None, Estimate | None]]:
    """Each held-out judge with the prior's score, the posterior's, and their difference."""
    held = at(subject.overall, "judges")
    for name in held if isinstance(held, Mapping) else ():
        found = {"reward": held[name]} if isinstance(held[name], Mapping) else {}
        change = estimate(held, name, "difference") or difference(found)[0]
        yield str(name), estimate(held, name, "prior"), estimate(held, name, "posterior"), change


def _better(subject: Subject) -> Line:
    question = "Did it get better?"
    change, paired = difference(subject.overall)
    if change is None:
        words = "There are no prior samples to compare with, or the reward was not measured."
        return Line(question, "Unknown", "unknown", words)
    against = "than the prior's at the same prompts and seeds" if paired else "than the prior's"
    in_std = number(subject.overall, "reward", "rise_in_prior_std")
    in_words = "" if in_std is None else f", {text(in_std, 2, signed=True)} of its standard deviations"
    size = Estimate(*(abs(v) for v in (change.mean,))).text()
    reach = "" if change.low is None or change.high is None else f" {_interval(change)}"
    judges, opposed = _judges(subject)
    if change.sign > 0:
        words = f"The mean reward is {size} higher{reach} {against}{in_words}.{_exact_rise(subject)}{judges}"
        if opposed:
            return Line(question, "By the reward; a judge disagrees", "partly", words)
        return Line(question, "Yes", "good", words)
    if change.sign < 0:
        words = f"The mean reward is {size} lower{reach} {against}{in_words}.{judges}"
        return Line(question, "No, worse", "bad", words)
    if change.low is None:
        words = (
            f"The mean reward differs by {change.text(signed=True)}; how well that is known was not measured.{judges}"
        )
        return Line(question, "Not known", "unknown", words)
    words = (
        f"The mean reward differs by {text(change.mean, 2, signed=True)}{reach}: the interval holds 0, so these samples tell no "
        f"difference.{judges}"
    )
    return Line(question, "Not shown", "unknown", words)


def _interval(value: Estimate) -> str:
    return Estimate(0.0, value.low, value.high).text().partition(" ")[2]


def _exact_rise(subject: Subject) -> str:
    """What the exact posterior would have gained, in the same unit."""
    reward = at(subject.overall, "reward")
    truth, before, std = (estimate(reward, key) for key in ("reweighted_prior", "prior", "prior_std"))
    if truth is None or before is None or std is None or std.mean <= 0:
        return ""
    return f" The exact posterior's would be {text((truth.mean - before.mean) / std.mean, 2, signed=True)}."


def _judges(subject: Subject) -> tuple[str, bool]:
    """What held-out judges say, and whether one clearly disagrees."""
    found = [(plain(name, 40), change.sign) for name, _, _, change in judged(subject) if change is not None]
    if not found:
        return "", False
    words = {1: "higher", 0: "no clear difference", -1: "lower"}
    said = "; ".join(f"{name} {words[sign]}" for name, sign in found)
    return f" Held-out judges: {said}.", any(sign < 0 for _, sign in found)


def _price(subject: Subject) -> Line:
    question = "At what price?"
    kl, exact = estimate(subject.overall, "kl"), estimate(subject.overall, "kl", "reweighted_prior")
    variety = _variety(subject)
    if kl is None:
        why = {
            "images": "images made elsewhere come without log-densities",
            "lora": "it was evaluated without log-densities",
        }.get(subject.kind, _left_out(subject, "kl") or "it was not measured")
        return Line(question, "KL not known", "unknown", f"The KL to the prior is not known: {why}.{variety}")
    answer = f"{text(kl.mean, 2)} nats"
    if exact is None:
        return Line(question, answer, "unknown", f"The KL to the prior is {kl.text(2)} nats.{variety}")
    error = math.hypot(*(0.0 if each.reach is None else max(each.reach) for each in (kl, exact)))
    too_much = kl.mean - exact.mean
    comparison = f"{text(abs(too_much), 2)} {'more' if too_much > 0 else 'less'} than the exact posterior's {text(exact.mean, 2)}"
    if too_much <= max(error, NEAR):
        tone: Tone = "good"
    else:
        tone = "bad" if kl.mean > 2 * exact.mean and too_much > 1 else "partly"
    return Line(question, answer, tone, f"The KL to the prior is {kl.text(2)} nats, {comparison}.{variety}")


def _variety(subject: Subject) -> str:
    before, after, exact = (
        number(subject.overall, "diversity", side, "vendi") for side in ("prior", "posterior", "reweighted_prior")
    )
    of = of_samples([subject.overall], "diversity", "samples")
    if after is None:
        return " Variety was not measured."
    if before is None:
        return f" Within a prompt it makes about {text(after, 1)} different samples{of} (Vendi)."
    known = "" if exact is None else f"; the exact posterior would keep at least {text(exact, 1)}"
    return f" Different samples{of} within a prompt (Vendi): {text(before, 1)} before, {text(after, 1)} now{known}."


def _posterior(subject: Subject) -> Line:
    question = "Is it the posterior that was asked for?"
    overall, few = subject.overall, number(subject.overall, "log_z", "effective_prior_samples")
    checks = at(subject.numbers, "posterior_check") or []
    elbo = number(overall, "elbo")
    low, high = (number(overall, "log_z", f"from_prior_{end}") for end in ("low", "high"))
    if elbo is None and not checks:
        return Line(question, "Unknown", "unknown", _why_unknown(subject))
    failed = [check for check in checks if not check["passed"]]
    shares = _shares(checks, failed)
    if few is not None and few < FEW:
        words = (
            f"Re-weighting leaves {text(few, 0)} effective prior samples in the thinnest prompt, and fewer than {FEW} say too "
            f"little of the exact posterior. Draw more (eval.prior_samples).{shares}"
        )
        return Line(question, "Too few prior samples to tell", "unknown", words)
    if elbo is None or low is None or high is None:
        words = f"Its log-density was not measured.{shares}"
        answer = "Not in its proportions" if failed else "In its proportions, as far as measured"
        return Line(question, answer, "bad" if failed else "partly", words)
    gap = low - elbo
    distance = f"The ELBO is {text(elbo, 2)}, log Z between {text(low, 2)} and {text(high, 2)}"
    if gap <= NEAR and not failed:
        return Line(
            question,
            "Yes, as far as this shows",
            "good",
            f"{distance}: no distance that these samples show.{shares}",
        )
    if gap <= NEAR:
        return Line(question, "Not in its proportions", "bad", f"{distance}.{shares}")
    short = f"{distance}: at least {text(gap, 2)} nats away from the exact posterior.{shares}"
    if checks and not failed:
        return Line(question, "In its proportions, not exactly", "partly", short)
    return Line(question, "Not yet" if not failed else "No", "bad", short)


def _shares(checks: Any, failed: Any) -> str:
    if not checks:
        return ""
    names = {plain(check["factor"], 40): check for check in checks}
    if not failed:
        return f" Shares of {', '.join(names)} are those of the re-weighted prior, within the tolerance."
    said = "; ".join(
        f"{plain(check['factor'], 40)} differs by {text(number(check, 'tv', 'mean'), 3)} in total variation"
        for check in failed
    )
    return f" Shares: {said}."


def _left_out(subject: Subject, metric: str) -> str:
    """Why a metric has no value; empty: it was not asked for."""
    rows = at(subject.numbers, "left_out") or []
    return next((str(row.get("why")) for row in rows if row.get("metric") == metric), "")


def _why_unknown(subject: Subject) -> str:
    if subject.kind == "images":
        return "Images made elsewhere come without log-densities, and no class shares were compared (eval.factors)."
    if subject.beta is None:
        return "Nobody said for which beta it was made, so there is no posterior to compare with."
    return "Neither its log-density nor shares of classes were measured."
