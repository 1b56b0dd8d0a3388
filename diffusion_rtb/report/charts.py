"""The charts of one subject: rewards, KL and norms by step, the posterior check, training; each also in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.report.drawing import HEIGHT, PRIOR_ORDER, colours, data, svg
from diffusion_rtb.report.numbers import at, number, text
from diffusion_rtb.report.subject import Subject

__all__ = ["Chart", "check_chart", "curve", "histogram", "steps_chart"]

BINS, POINTS = (8, 40), 400
"""Bars of a histogram, at least and at most; points of a curve, at most."""

LABEL = 40
"""Characters of a class name beside its bar."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, a caption, and the same in words."""

    title: str
    svg: Markup
    words: str
    caption: str = ""
    legend: tuple[str, ...] = ()
    """Roles that it shows."""


def histogram(subject: Subject, key: str, title: str, name: str) -> Chart | None:
    """Prior, posterior and, with beta, the re-weighted prior over each other; None where no side has the value.

    The prior's samples count exp(beta·r) / sum exp(beta·r) of their prompt, and every prompt the same.
    """
    values = {side: subject.of(side, key) for side in ("prior", "posterior")}
    known = {side: v.astype(np.float64)[np.isfinite(v)] for side, v in values.items() if v is not None}
    known = {side: v for side, v in known.items() if len(v)}
    if not known:
        return None
    everything = np.concatenate(list(known.values()))
    bins = int(np.clip(2 * min(map(len, known.values())) ** (1 / 3), *BINS))  # Rice's rule
    edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-9), bins + 1)
    shares: dict[str, Any] = {side: np.histogram(v, edges)[0] / len(v) for side, v in known.items()}
    weights = _weights(subject)
    prior = values["prior"]
    if prior is not None and weights is not None:
        shares["re-weighted prior"] = np.histogram(prior.astype(np.float64), edges, weights=weights)[0]
    rows = [
        {"value": float(edge), "share": float(share), "side": side}
        for side, s in shares.items()
        for edge, share in zip(edges, [*s, 0.0], strict=True)
    ]
    words = "; ".join(f"{side} mean {text(_mean(s, edges))}" for side, s in shares.items())
    return Chart(title, svg(_histogram(rows, title), name), f"Histogram of {title}: {words}.", "", _roles(shares))


def _histogram(rows: Sequence[Mapping[str, Any]], title: str) -> alt.LayerChart:
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(tickCount=6))
    y = alt.Y("share:Q", title="share of samples", axis=alt.Axis(format="%", tickCount=4), stack=None)
    color = alt.Color("side:N", scale=colours(PRIOR_ORDER), legend=None)
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=color)
    sides = base.transform_filter("datum.side != 're-weighted prior'")
    truth = base.transform_filter("datum.side == 're-weighted prior'")
    return alt.LayerChart(
        layer=[
            sides.mark_area(interpolate="step-after", fillOpacity=0.4, line={"strokeWidth": 1.2}),
            truth.mark_line(interpolate="step-after", strokeWidth=2, strokeDash=[5, 2]),
        ]
    )


def _weights(subject: Subject) -> Float[np.ndarray, " samples"] | None:
    reward, prompt = subject.of("prior", "reward"), subject.of("prior", "prompt")
    if reward is None or prompt is None or subject.beta is None or not len(reward) or not np.isfinite(reward).all():
        return None
    weights = np.zeros(len(reward))
    rows = np.unique(prompt)
    for row in rows:
        of = prompt == row
        w = np.exp(subject.beta * (reward[of].astype(np.float64) - reward[of].max()))
        weights[of] = w / w.sum() / len(rows)
    return weights


def _mean(shares: Any, edges: Any) -> float:
    return float((shares * (edges[1:] + edges[:-1]) / 2).sum() / max(shares.sum(), 1e-300))


def _roles(names: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(role for role in PRIOR_ORDER if role in names)


def steps_chart(
    values: Sequence[Any],
    title: str,
    unit: str,
    name: str,
    *,
    level: float | None = None,
    exact: Sequence[Any] | None = None,
) -> Chart | None:
    """One bar for each step of the chain; or a line with dots, where they lie around a `level`.

    Args:
        values: Of each step, first the noisiest.
        title: Of the chart.
        unit: Of its axis.
        name: See `svg`.
        level: What an untrained model has.
        exact: What the exact posterior has at each step, where that is known.
    """
    rows = [{"step": i + 1, "value": number(list(values), i)} for i in range(len(values))]
    known = [row for row in rows if row["value"] is not None]
    if not known:
        return None
    x = alt.X("step:O", title="step, from noise to sample", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("value:Q", title=unit, scale=alt.Scale(zero=level is None), axis=alt.Axis(tickCount=5))
    base = alt.Chart(data(rows)).encode(x=x, y=y)
    line = base.mark_line(color="var(--posterior)", point={"color": "var(--posterior)"})
    layers = [base.mark_bar(color="var(--posterior)") if level is None else line]
    if level is not None:
        rule = alt.Chart(data([{"value": level}])).mark_rule(color="var(--prior)", strokeWidth=1.5, strokeDash=[5, 3])
        layers.insert(0, rule.encode(y="value:Q"))
    if exact:
        truth = [{"step": i + 1, "value": number(list(exact), i)} for i in range(len(exact))]
        ticks = alt.Chart(data(truth)).mark_tick(color="var(--truth)", thickness=3, orient="horizontal")
        layers.append(ticks.encode(x=x, y=y))
    largest = max(known, key=lambda row: row["value"] or 0.0)
    words = f"{title} at {len(rows)} steps; the largest, {text(largest['value'], 3)}, at step {largest['step']}."
    caption = "Gold: what the exact posterior needs." if exact else ""
    return Chart(title, svg(alt.LayerChart(layer=layers), name), words, caption)


def check_chart(check: Mapping[str, Any], name: str) -> Chart:
    """Shares of each class: bars of the three roles with their intervals, where the numbers have them."""
    labels = [plain(label, LABEL) for label in check["labels"]]
    keys = {"prior": "prior", "re-weighted prior": "reweighted", "posterior": "posterior"}
    rows = [
        {
            "label": label,
            "order": i,
            "side": side,
            "share": number(check, key, i),
            "low": number(check, f"{key}_interval", i, 0),
            "high": number(check, f"{key}_interval", i, 1),
        }
        for side, key in keys.items()
        for i, label in enumerate(labels)
    ]
    y = alt.Y("label:N", title=None, sort=labels, axis=alt.Axis(labelLimit=110, ticks=False, domain=False))
    offset = alt.YOffset("side:N", sort=list(PRIOR_ORDER))
    base = alt.Chart(data(rows)).encode(y=y, yOffset=offset)
    x = alt.X("share:Q", title="share of samples", axis=alt.Axis(format="%", tickCount=5))
    bars = base.mark_bar().encode(x=x, color=alt.Color("side:N", scale=colours(PRIOR_ORDER), legend=None))
    known = base.transform_filter("isValid(datum.low)")
    reach = known.mark_rule(color="var(--ink)", strokeWidth=1.3).encode(x="low:Q", x2="high:Q")
    shown = "; ".join(
        f"{label} {', '.join(text(number(check, key, i), 3) for key in keys.values())}"
        for i, label in enumerate(labels)
    )
    return Chart(
        f"Shares of each {plain(check['factor'], LABEL)}",
        svg(alt.LayerChart(layer=[bars, reach]), name, height=max(HEIGHT - 70, 46 * len(labels) + 44)),
        f"Shares in prior, re-weighted prior and posterior: {shown}.",
        legend=PRIOR_ORDER,
    )


def curve(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    name: str,
    *,
    level: float | None = None,
    marks: Sequence[int] = (),
) -> Chart | None:
    """One number over the iterations of training.

    Args:
        rows: Of metrics.jsonl.
        key: Of the number.
        title: Of the chart.
        name: See `svg`.
        level: What a perfect model would show, a dashed line.
        marks: Iterations of alarms, vertical lines.
    """
    known = [(int(row["iteration"]), value) for row in rows if (value := number(row, key)) is not None]
    if len({value for _, value in known}) < 2:
        return None  # nothing changes
    thin = known[:: -(-len(known) // POINTS)]
    thin = thin if thin[-1] == known[-1] else [*thin, known[-1]]
    points = [{"iteration": i, "value": value} for i, value in thin]
    x = alt.X("iteration:Q", title="iteration", axis=alt.Axis(tickCount=5, format="d"))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
    layers = [alt.Chart(data(points)).mark_line(color="var(--posterior)", strokeWidth=1.6).encode(x=x, y=y)]
    if level is not None:
        rule = alt.Chart(data([{"value": level}])).mark_rule(color="var(--truth)", strokeWidth=2, strokeDash=[5, 2])
        layers.append(rule.encode(y="value:Q"))
    if marks:
        alarms = alt.Chart(data([{"iteration": i} for i in marks])).mark_rule(color="var(--bad)", strokeWidth=1.2)
        layers.append(alarms.encode(x="iteration:Q"))
    first, last = known[0], known[-1]
    words = f"{title}: {text(first[1], 3)} at iteration {first[0]}, {text(last[1], 3)} at iteration {last[0]}."
    return Chart(title, svg(alt.LayerChart(layer=layers), name, height=150), words)


def every(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of metrics.jsonl in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row if at(row, key) is not None))
