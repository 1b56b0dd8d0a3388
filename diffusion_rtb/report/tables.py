"""The tables of the page: what each row and column holds; a first column of names, then numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_rtb.evaluation.comparison_table import common_samples
from diffusion_rtb.report.drawing import COLOURS
from diffusion_rtb.report.frontier import series
from diffusion_rtb.report.numbers import Estimate, at, decimals, estimate, flat, number, of_samples, text
from diffusion_rtb.report.subject import EMPTY, Subject
from diffusion_rtb.report.verdict import achieved, difference, judged, verdict

__all__ = ["Cell", "Table", "check_table", "facts", "judge_table", "overview", "prompt_table", "summary"]

PROMPTS = 400
"""Rows of the table of prompts, at most."""

SUMMARISED = {"reward", "kl", "diversity", "ess", "log_z", "strength", "judges"}
"""Metrics that the table of sides shows in columns of its own, or that have a place elsewhere."""

VENDI = ("diversity", "samples")
"""Where the number of samples of a Vendi score stands."""

LISTED = 12
"""Numbers of a list that are written out."""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it is sorted by."""

    text: str
    value: float | None = None
    role: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = False
    numeric: bool = True
    """The columns after the first hold numbers."""

    @property
    def names(self) -> list[tuple[str, Sequence[Cell]]]:
        """Title of each row, and its other cells."""
        return [(row[0].text, row[1:]) for row in self.rows]


def _column(values: Sequence[Estimate | None]) -> list[Cell]:
    """The numbers of a column with equally many decimals."""
    places = decimals([v for e in values if e is not None for v in (e.mean, e.low, e.high)])
    return [Cell("–") if e is None else Cell(e.text(places), e.mean) for e in values]


def _filled(caption: str, first: str, names: Sequence[Cell], columns: Mapping[str, Sequence[Estimate | None]]) -> Table:
    """A table without the columns that hold nothing."""
    kept = {title: _column(values) for title, values in columns.items() if any(v is not None for v in values)}
    rows = zip(names, *kept.values(), strict=True)
    return Table(caption, (first, *kept), tuple(tuple(row) for row in rows))


def summary(subject: Subject) -> Table:
    """Prior, re-weighted prior and posterior as rows: the second is what a perfect model would show."""
    overall, keys = subject.overall, ("prior", "reweighted_prior", "posterior")
    share, count = number(overall, "ess", "prior"), number(subject.numbers, "samples", "prior")
    effective = None if share is None or count is None else Estimate(share * count)
    spoken = [Cell(role, role=role) for role in COLOURS]
    known = [role for role, key in zip(spoken, keys, strict=True) if _side_known(subject, key)]
    names = known or [spoken[2]]
    chosen = [keys[spoken.index(name)] for name in names]
    made = {
        "reward": [estimate(overall, "reward", key) for key in chosen],
        **_quantiles(overall, chosen),
        "KL, nats": [_kl(overall, key) for key in chosen],
        f"Vendi{of_samples([overall], *VENDI)}": [estimate(overall, "diversity", key, "vendi") for key in chosen],
        "distance": [estimate(overall, "diversity", key, "pairwise_cosine_distance") for key in chosen],
        "effective samples per prompt": [_effective(subject, key, effective) for key in chosen],
    }
    return _filled("Overall, every prompt with the same say", "samples of", names, made | _others(overall, chosen))


def _others(overall: Mapping[str, Any], sides: Sequence[str]) -> dict[str, list[Estimate | None]]:
    """Every further metric that has a number, or several, of the posterior and perhaps of the other sides."""
    found: dict[str, list[Estimate | None]] = {}
    for name, value in overall.items():
        after = at(value, "posterior")
        if name in SUMMARISED or after is None:
            continue
        keys = [()] if estimate(after) is not None else [(key,) for key in after] if isinstance(after, Mapping) else []
        found |= {" ".join([name, *key]): [estimate(value, side, *key) for side in sides] for key in keys}
    return found


def _side_known(subject: Subject, key: str) -> bool:
    return estimate(subject.overall, "reward", key) is not None


def _quantiles(overall: Mapping[str, Any], sides: Sequence[str]) -> dict[str, list[Estimate | None]]:
    """Quantiles of the reward, where the numbers have them."""
    names = sorted({name for side in sides for name in (at(overall, "reward", "quantiles", side) or {})}, key=float)
    return {
        f"reward, {float(name):.0%} below": [estimate(overall, "reward", "quantiles", side, name) for side in sides]
        for name in names
    }


def _kl(overall: Mapping[str, Any], key: str) -> Estimate | None:
    """The prior's own is 0, where any is known."""
    known = estimate(overall, "kl")
    if key == "reweighted_prior":
        return estimate(overall, "kl", "reweighted_prior")
    return Estimate(0.0) if key == "prior" and known is not None else known


def _effective(subject: Subject, key: str, reweighted: Estimate | None) -> Estimate | None:
    if key == "reweighted_prior":
        return reweighted
    count = number(subject.numbers, "samples", key)
    return None if count is None else Estimate(count)


def prompt_table(subject: Subject) -> tuple[Table, int]:
    """One row per prompt, and how many prompts it leaves out: those in the middle of many, by the rise of their reward."""
    every: list[Mapping[str, Any]] = list(at(subject.numbers, "per_prompt") or [])
    rows = every
    if len(every) > PROMPTS:
        ranked = sorted(every, key=lambda row: -(_rise(row) or 0.0))
        rows = ranked[: PROMPTS // 2] + ranked[-PROMPTS // 2 :]
    of = of_samples(rows, *VENDI)
    columns = {
        "prior": [_mean(row, "reward", "prior") for row in rows],
        "re-weighted": [_mean(row, "reward", "reweighted_prior") for row in rows],
        "posterior": [_mean(row, "reward", "posterior") for row in rows],
        "higher by": [difference(row)[0] for row in rows],
        "strength": [_mean(row, "strength", "slope") for row in rows],
        "KL, nats": [_mean(row, "kl") for row in rows],
        f"Vendi{of} before": [_mean(row, "diversity", "prior", "vendi") for row in rows],
        f"Vendi{of} now": [_mean(row, "diversity", "posterior", "vendi") for row in rows],
        "ESS": [_mean(row, "ess", "posterior") for row in rows],
    }
    names = [Cell(str(row.get("prompt") or EMPTY), float(i)) for i, row in enumerate(rows)]
    found = _filled("Mean reward and what it cost, prompt by prompt", "prompt", names, columns)
    return Table(found.caption, found.head, found.rows, sortable=True), len(every) - len(rows)


def _mean(row: Mapping[str, Any], *names: str) -> Estimate | None:
    found = estimate(row, *names)
    return None if found is None else Estimate(found.mean)


def _rise(row: Mapping[str, Any]) -> float | None:
    change = difference(row)[0]
    return None if change is None else change.mean


def judge_table(subject: Subject) -> Table | None:
    """What held-out judges say of both sides."""
    found = list(judged(subject))
    if not found:
        return None
    columns = {title: [row[i] for row in found] for i, title in enumerate(("prior", "posterior", "difference"), 1)}
    rows: dict[str, list[Estimate | None]] = {
        t: [v if isinstance(v, Estimate) else None for v in c] for t, c in columns.items()
    }
    return _filled("Held-out judges, which training did not see", "judge", [Cell(row[0]) for row in found], rows)


def check_table(check: Mapping[str, Any]) -> Table:
    """The shares behind the bars, in numbers."""
    labels = [Cell(str(label)) for label in check["labels"]]
    keys = {"prior": "prior", "re-weighted prior": "reweighted", "posterior": "posterior"}
    columns = {
        title: [
            None if (mean := number(check, key, i)) is None
            else Estimate(mean, *(number(check, f"{key}_interval", i, end) for end in (0, 1)))
            for i in range(len(labels))
        ]
        for title, key in keys.items()
    }  # fmt: skip
    return _filled(f"Shares of each {check['factor']}, in numbers", str(check["factor"]), labels, columns)


def facts(caption: str, first: str, tree: Any) -> Table:
    """Every leaf of a tree as a row: its name and its value."""
    rows = tuple((Cell(name), Cell(_fact(value))) for name, value in flat(tree))
    return Table(caption, (first, "value"), rows, numeric=False)


def _fact(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text(value, decimals([value]) + 1)
    if isinstance(value, list):
        shown = ", ".join(map(_fact, value[:LISTED]))
        return shown if len(value) <= LISTED else f"{shown}, … ({len(value)} in all)"
    return str(value)


def overview(subjects: Sequence[Subject]) -> Table:
    """Several subjects, one a row; their verdicts last."""
    shares = [achieved(subject) for subject in subjects]
    columns = {
        "beta": [None if s.beta is None else Estimate(s.beta) for s in subjects],
        "achieved strength": [None if share is None else share[0] for share in shares],
        "reward": [_mean(s.overall, "reward", "posterior") for s in subjects],
        "re-weighted prior": [_mean(s.overall, "reward", "reweighted_prior") for s in subjects],
        "higher by": [difference(s.overall)[0] for s in subjects],
        "KL, nats": [_mean(s.overall, "kl") for s in subjects],
        "exact KL": [_mean(s.overall, "kl", "reweighted_prior") for s in subjects],
    }
    if common_samples([s.overall for s in subjects]):
        title = f"Vendi{of_samples([s.overall for s in subjects], *VENDI)}"
        columns[title] = [_mean(s.overall, "diversity", "posterior", "vendi") for s in subjects]
    names = [Cell(name, role=f"series-{1 + i % 6}") for i, (name, _) in enumerate(series(subjects))]
    found = _filled("All of them side by side", "subject", names, columns)
    answers = [Cell(verdict(subject)[2].answer) for subject in subjects]
    rows = tuple((*row, answer) for row, answer in zip(found.rows, answers, strict=True))
    return Table(found.caption, (*found.head, "the posterior?"), rows, sortable=True)
