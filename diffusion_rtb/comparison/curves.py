"""How near each sampler came to the truth at what cost, and what it has of the reward for how much KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusion_rtb.comparison.cost import TITLES
from diffusion_rtb.comparison.results import REACHED, Comparison, median_run
from diffusion_rtb.comparison.truths.truth import Result
from diffusion_rtb.files.plain_text import plain

__all__ = ["FAINT", "INK", "TRUE", "colours", "draw_curves", "title"]

INK, FAINT, TRUE = "#202020", "#8a8a8a", "#c9a227"


def title(found: Comparison, pair: tuple[str, str]) -> str:
    """What tells the pair from the others: its objective, its behaviour, or both."""
    pairs = {cell.pair for cell in found.plan.cells}
    several = [len({p[i] for p in pairs}) > 1 for i in (0, 1)]
    parts = [part for part, tells in zip(pair, several, strict=True) if tells]
    return "\n".join(map(plain, parts or pair[:1]))


CYCLE = 20
"""Colours there are; curves of further samplers are dashed."""


def colours(found: Comparison) -> dict[tuple[str, str], Any]:
    """One for each objective and behaviour."""
    from matplotlib import colormaps

    pairs = list(dict.fromkeys(cell.pair for cell in found.plan.cells))
    table = colormaps["tab20"]  # tab10, and the same colours pale
    order = [*range(0, CYCLE, 2), *range(1, CYCLE, 2)]
    return {pair: table(order[i % CYCLE]) for i, pair in enumerate(pairs)}


def draw_curves(figure: Any, found: Comparison) -> None:
    """TV, where there are shares to count, and the ELBO's distance to log Z, both against the cost; then reward against KL.

    Without log-densities there is no ELBO and no KL: the reward then stands against the cost, and nothing against the KL.
    """
    every = [result for runs in found.results.values() for _, result in runs]
    kinds = [("tv", "TV")] if any("tv" in result.numbers for result in every) else []
    dense = any("elbo" in result.numbers for result in every)
    kinds += [("gap", "log Z − ELBO, nats") if dense else ("reward", "reward")]
    places = figure.subplots(1, len(kinds) + dense, squeeze=False)[0]
    for place, (kind, label) in zip(places, kinds, strict=False):
        _cost_curves(place, found, kind)
        place.set_xlabel(TITLES[found.plan.cost], fontsize=8)
        place.set_ylabel(label, fontsize=8)
    if dense:
        _price(places[-1], found)
    for place in places:
        place.tick_params(labelsize=7, which="both")
        place.grid(True, which="major", color="#ececec", linewidth=0.6)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    legend = figure.legend(*places[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label(found: Comparison, pair: tuple[str, str]) -> str:
    return " · ".join(title(found, pair).split("\n"))


def _cost_curves(place: Any, found: Comparison, kind: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    colour = colours(found)
    for pair, runs in found.results.items():
        ways = [way for way in (_points(result, kind, found.plan.cost) for _, result in runs) if way]
        if ways:
            style = "--" if list(colour).index(pair) >= CYCLE else "-"
            _line(place, ways, colour[pair], _label(found, pair), style)
    for reference in found.plan.truth.references[:1]:
        needed = {"gap": "elbo"}.get(kind, kind)
        heights = [_height(result.numbers, kind) for _, result in reference.runs if needed in result.numbers]
        level = sorted(heights)[len(heights) // 2] if heights else LEAST
        if level > LEAST:
            label = f"{reference.name}: {reference.kind}"
            place.axhline(level, color=TRUE, linewidth=1, linestyle="--", label=label)
    if kind == "tv":
        place.axhline(REACHED, color=FAINT, linewidth=0.8, linestyle=":", label=f"TV {REACHED:g}")
    if kind == "reward":
        return
    place.set_yscale("log")
    # 0.05 instead of 5 x 10^-2, and only where labels have room.
    place.yaxis.set_major_formatter(FuncFormatter(_plain))
    place.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    place.yaxis.set_minor_formatter(FuncFormatter(_plain))


def _price(place: Any, found: Comparison) -> None:
    """Each sampler on its way from the prior, and the truth as a star."""
    colour = colours(found)
    for pair, runs in found.results.items():
        shown = median_run([result for _, result in runs])
        way = [(p["kl"], p["reward"]) for p in [*shown.curve, shown.numbers] if "kl" in p and "reward" in p]
        place.plot(*zip(*way, strict=True), color=colour[pair], linewidth=0.8, alpha=0.6) if way else None
        ends = [(n["kl"], n["reward"]) for n in (result.numbers for _, result in runs) if "reward" in n and "kl" in n]
        place.plot(*zip(*ends, strict=True), "o", markersize=4, color=colour[pair]) if ends else None
    for reference in found.plan.truth.references[:1]:
        for _, result in reference.runs[:1]:
            if "reward" in result.numbers:
                place.plot(result.numbers["kl"], result.numbers["reward"], "*", markersize=11, color=TRUE)
    _stretched(place, found)
    place.set_xlabel("KL, nats", fontsize=8)
    place.set_ylabel("reward", fontsize=8)


FAR = 4.0
"""Times the true posterior's KL, from where on the axis is logarithmic where a sampler went that far."""


NEAR = 8
"""How many decades beside it the part of the axis up to there is as wide as."""


def _stretched(place: Any, found: Comparison) -> None:
    """Keep those near the truth apart where others ran away."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    known = [
        r.numbers["kl"] for reference in found.plan.truth.references[:1] for _, r in reference.runs if "kl" in r.numbers
    ]
    far, (_, right) = FAR * max(known, default=0.0), place.get_xlim()
    if not 0 < far < right:
        return
    place.set_xscale("symlog", linthresh=far, linscale=NEAR)
    place.set_xticks(_ticks(far, right))
    place.xaxis.set_major_formatter(FuncFormatter(_plain))
    place.xaxis.set_minor_locator(NullLocator())
    place.set_xlim(-far / 20, 1.5 * right)


def _ticks(far: float, right: float) -> list[float]:
    """Where the axis has numbers: evenly up to `far`, then at the decades below `right`, none so close that they run together."""
    from matplotlib.ticker import MaxNLocator

    decades = [10.0**k for k in range(math.ceil(math.log10(far)), math.ceil(math.log10(right)))]
    even = [x for x in MaxNLocator(4).tick_values(0, far) if 0 <= x <= far]
    if decades:
        even = [x for x in even if NEAR * (1 - x / far) + math.log10(decades[0] / far) >= 1]
    return [*even, *decades]


LEAST = 1e-4
"""Nats below which a distance is drawn at this height."""


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _height(point: Mapping[str, Any], kind: str, log_z: float | None = None) -> float:
    log_z = point["exact_log_z"] if log_z is None else log_z
    return max(LEAST, float(log_z - point["elbo"])) if kind == "gap" else float(point[kind])


def _points(result: Result, kind: str, cost: str) -> list[tuple[float, float]]:
    """(cost, value) of every look and of the end that has it."""
    log_z, needed = result.numbers["exact_log_z"], {"gap": "elbo"}.get(kind, kind)
    points = [point for point in [*result.curve, result.numbers] if needed in point]
    return [(float(point.get(cost, 0.0)), _height(point, kind, log_z)) for point in points]


def _line(place: Any, runs: Sequence[Sequence[tuple[float, float]]], colour: Any, label: str, style: str) -> None:
    """Median over seeds at their k-th look, its time the median time, and a band from the least to the most."""
    count = min(map(len, runs))
    seconds, values = (torch.tensor([[point[i] for point in run[:count]] for run in runs]) for i in (0, 1))
    x = seconds.median(0).values.tolist()
    place.plot(x, values.median(0).values.tolist(), color=colour, linestyle=style, linewidth=1.4, label=label)
    if len(runs) > 1:
        place.fill_between(
            x, values.min(0).values.tolist(), values.max(0).values.tolist(), color=colour, alpha=0.15, linewidth=0
        )
