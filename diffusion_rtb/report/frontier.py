"""What was bought and what it cost: reward against KL and against diversity, over the checkpoints of a run and over subjects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from diffusion_rtb.evaluation.comparison_table import common_samples
from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.report.charts import Chart
from diffusion_rtb.report.drawing import SERIES, data, svg
from diffusion_rtb.report.numbers import at, number, text
from diffusion_rtb.report.subject import Subject
from diffusion_rtb.run.metrics_file import curve

__all__ = ["LONGEST", "frontiers", "series"]

LONGEST = 60
"""Characters of a name in a legend."""

AXES = (("kl", "KL to the prior, nats", "Reward and its price"), ("vendi", "Vendi score", "Reward and variety"))
"""What stands against the reward: key, title of its axis, title of the chart."""


def series(subjects: Sequence[Subject]) -> list[tuple[str, str]]:
    """Name and colour of each subject on charts of several."""
    return [(plain(subject.name, LONGEST), SERIES[i % len(SERIES)]) for i, subject in enumerate(subjects)]


def frontiers(subjects: Sequence[Subject], name: str) -> list[Chart]:
    """Two charts, those of which have more to show than one point; that of Vendi scores only where all are of as many samples.

    Of each subject: its training as a line (`curve` of metrics.jsonl), the evaluated posterior, the prior, and the
    re-weighted prior, which is where a perfect model would be. Of one subject also the line reward = (log Z + KL) / beta: no
    model can lie above it, and only the exact posterior touches it.
    """
    found = []
    count = common_samples([subject.overall for subject in subjects])
    for key, title, heading in AXES:
        if key == "vendi" and count is None:
            continue
        title = f"{title} of {count} samples" if key == "vendi" else title
        rows = [row for i, subject in enumerate(subjects) for row in _points(subject, i, key, alone=not subjects[1:])]
        if len([row for row in rows if row["what"] != "prior"]) < 2:
            continue
        bound = _bound(subjects[0], rows) if key == "kl" and not subjects[1:] else []
        words = "; ".join(_words(row, title) for row in rows if row["what"] != "checkpoint")
        drawn = svg(_chart(rows, bound, title), f"{name}-{key}", height=240)
        found.append(Chart(heading, drawn, f"Reward against {title}: {words}.", _caption(rows, bound, subjects, key)))
    return found


def _points(subject: Subject, order: int, key: str, *, alone: bool) -> Iterator[dict[str, Any]]:
    overall, colour = subject.overall, SERIES[order % len(SERIES)]
    colours = {"prior": "var(--prior)", "re-weighted prior": "var(--truth)", "posterior": "var(--posterior)"}

    def point(what: str, x: float | None, y: float | None, step: int = 0) -> Iterator[dict[str, Any]]:
        if x is not None and y is not None:
            shade = colours.get(what, "var(--posterior)") if alone else colour
            yield {"x": x, "y": y, "what": what, "subject": str(order), "colour": shade, "step": step} | {
                "name": subject.name
            }

    for row in _looks(subject, key):
        yield from point("checkpoint", number(row, key), number(row, "reward"), int(row["iterations"]))
    reward = at(overall, "reward")
    values = {"prior": 0.0, "posterior": number(overall, "kl", "mean"), "reweighted_prior": None}
    values["reweighted_prior"] = number(overall, "kl", "reweighted_prior", "mean")
    if key == "vendi":
        values = {side: number(overall, "diversity", side, "vendi") for side in values}
    yield from point("prior", values["prior"], number(reward, "prior", "mean"))
    yield from point("re-weighted prior", values["reweighted_prior"], number(reward, "reweighted_prior", "mean"))
    yield from point("posterior", values["posterior"], number(reward, "posterior", "mean"))


def _looks(subject: Subject, key: str) -> list[dict[str, Any]]:
    """Where the training could be stopped; on a chart of Vendi scores only looks at as many samples, in the same space."""
    found = curve(subject.training)
    if key != "vendi":
        return found
    same = at(subject.overall, "diversity", "embedder") == at(subject.numbers, "run", "watch_embedder")
    count = number(subject.overall, "diversity", "samples")
    return [row for row in found if same and row["samples"] == count]


def _bound(subject: Subject, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Two points of beta·reward = log Z + KL, within what the chart shows."""
    log_z = number(subject.overall, "log_z", "from_prior")
    if log_z is None or not subject.beta:
        return []
    ys = [row["y"] for row in rows]
    low, high = max(0.0, subject.beta * min(ys) - log_z), max(row["x"] for row in rows)
    top = subject.beta * max(ys) - log_z
    return [{"x": kl, "y": (log_z + kl) / subject.beta} for kl in (low, min(high, max(top, low)))]


def _chart(rows: Sequence[dict[str, Any]], bound: Sequence[dict[str, float]], title: str) -> alt.LayerChart:
    x = alt.X("x:Q", title=title, axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title="mean reward", axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=False))
    color = alt.Color("colour:N", scale=None)
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=color)
    checkpoints = base.transform_filter("datum.what == 'checkpoint'")
    layers = [
        checkpoints.mark_line(strokeWidth=1.4, opacity=0.7).encode(order="step:Q", detail="subject:N"),
        checkpoints.mark_point(filled=True, size=16, opacity=0.8),
        base.transform_filter("datum.what != 'checkpoint'")
        .mark_point(filled=True, size=110, opacity=1, stroke="var(--paper)", strokeWidth=1)
        .encode(shape=alt.Shape("what:N", scale=_shapes(), legend=None)),
    ]
    if bound:
        line = alt.Chart(data(bound)).mark_line(color="var(--truth)", strokeDash=[5, 3], strokeWidth=1.5)
        layers.insert(0, line.encode(x="x:Q", y="y:Q"))
    return alt.LayerChart(layer=layers)


def _shapes() -> alt.Scale:
    return alt.Scale(domain=["prior", "re-weighted prior", "posterior"], range=["square", "diamond", "circle"])


def _words(row: dict[str, Any], title: str) -> str:
    return f"{plain(row['name'], LONGEST)}, {row['what']}: {text(row['x'])} ({title}), reward {text(row['y'])}"


def _caption(rows: Sequence[dict[str, Any]], bound: Sequence[Any], subjects: Sequence[Subject], key: str) -> str:
    parts = ["Square: prior. Diamond: re-weighted prior, where a perfect model would be. Dot: the model."]
    if any(row["what"] == "checkpoint" for row in rows):
        parts.append("The line goes through its training.")
    if any(row["vendi"] is not None for s in subjects for row in curve(s.training) if row not in _looks(s, key)):
        parts.append(
            "Looks in training at another number of samples, or in another space, cannot be compared and are left out."
        )
    if bound:
        parts.append("Dashed: (log Z + KL) / beta, which no model can be above.")
    return " ".join(parts)
