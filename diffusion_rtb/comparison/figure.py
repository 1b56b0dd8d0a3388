"""A comparison as one picture: samples over the true density, one panel per sampler, and how fast each came near the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.comparison.results import REACHED, Comparison, Result, median_run
from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.files.whole import whole

__all__ = ["draw_figure"]

WIDTH = 6
"""Panels in one row, at most."""

PANEL, TEXT, CURVES = 2.5, 0.65, 3.4
"""Inches: a panel's side, the height of the words above and below it, that of the curves."""

DRAWN = 1500
"""Samples in a panel."""

INK, FAINT, TRUE = "#202020", "#8a8a8a", "#c9a227"


def draw_figure(found: Comparison) -> Path:
    """Write figure.png into the comparison's folder and return its path.

    The panels: exact samples, the truth through the chain, then one per objective and behaviour, each with the seed whose TV (or
    W2, where there are no modes) is the median. Below them the curves: median over seeds, and their range as a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(found)
    lines = math.ceil(len(panels) / WIDTH)
    columns = math.ceil(len(panels) / lines)
    frame = _Frame(found)
    height = lines * (PANEL * frame.ratio + TEXT)
    figure = Figure(figsize=(max(columns * PANEL, 7.0), height + CURVES), dpi=130, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, CURVES])
    upper, lower = parts
    axes = upper.subplots(lines, columns, squeeze=False).flatten()
    for place, (title, note, x, colour) in zip(axes, panels, strict=False):
        frame.draw(place, x, colour)
        # A name is a name, also with dollars in it.
        place.set_title(title, fontsize=9, color=INK, pad=3, parse_math=False)
        place.set_xlabel(note, fontsize=8, color=FAINT, labelpad=3)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    _curves(lower, found)
    path = found.plan.folder / "figure.png"
    FigureCanvasAgg(figure)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight", pad_inches=0.1)
    return path


def _panels(found: Comparison) -> list[tuple[str, str, Tensor, Any]]:
    """Title, note, samples and colour of each panel."""
    exact = found.plan.target.sample(DRAWN, torch.Generator().manual_seed(seed_of(0, "figure")))
    panels: list[tuple[str, str, Tensor, Any]] = [("exact samples", "", exact, INK)]
    if found.truth:
        truth = median_run(found.truth)
        panels.append(("truth through the chain", _note(truth), truth.samples, INK))
    colours = _colours(found)
    for pair, runs in found.results.items():
        result = median_run([result for _, result in runs])
        panels.append((_title(found, pair), _note(result), result.samples, colours[pair]))
    return panels


def _title(found: Comparison, pair: tuple[str, str]) -> str:
    """What tells the pair from the others: its objective, its behaviour, or both."""
    pairs = {cell.pair for cell in found.plan.cells}
    several = [len({p[i] for p in pairs}) > 1 for i in (0, 1)]
    parts = [part for part, tells in zip(pair, several, strict=True) if tells]
    return "\n".join(map(plain, parts or pair[:1]))


def _note(result: Result) -> str:
    n = result.numbers
    return f"TV {n['tv']:.3f}, off {100 * n['off']:.2f} %" if "tv" in n else f"W2 {n['w2']:.3f}, ELBO {n['elbo']:.3f}"


def _colours(found: Comparison) -> dict[tuple[str, str], Any]:
    from matplotlib import colormaps

    pairs = list(dict.fromkeys(cell.pair for cell in found.plan.cells))
    table = colormaps["tab10" if len(pairs) <= 10 else "tab20"]
    return {pair: table(i % table.N) for i, pair in enumerate(pairs)}


class _Frame:
    """What all panels share: the region of the plane, and the contours of the true density where it is known there."""

    def __init__(self, found: Comparison) -> None:
        target = found.plan.target
        exact = target.sample(4000, torch.Generator().manual_seed(seed_of(0, "frame")))
        centres = exact[:0] if target.modes is None else target.modes.centres
        low, high = (getattr(torch.cat([exact, centres]), name)(0).values[:2] for name in ("min", "max"))
        margin = 0.06 * (high - low)
        self.exact, self.low, self.high = exact, low - margin, high + margin
        self.levels: Tensor | None = None
        if exact.shape[1] == 2 and target.log_density is not None:
            axes = [
                torch.linspace(float(a), float(b), 220, dtype=torch.float64)
                for a, b in zip(self.low, self.high, strict=True)
            ]
            self.mesh = torch.meshgrid(*axes, indexing="xy")
            points = torch.stack(self.mesh, dim=-1).reshape(-1, 2)
            self.levels = target.log_density(points).reshape(self.mesh[0].shape)
            # Contours at the densities that 99, 90, 50 and 10 % of the exact samples exceed.
            held = target.log_density(exact)
            self.heights = held.quantile(torch.tensor([0.01, 0.1, 0.5, 0.9], dtype=torch.float64)).unique().tolist()

    @property
    def ratio(self) -> float:
        """Height of a panel by its width; contours have equal units in both directions."""
        if self.levels is None:
            return 1.0
        width, height = (self.high - self.low).tolist()
        return min(1.5, max(0.5, height / width))

    def draw(self, place: Any, x: Float[Tensor, "n dim"], colour: Any) -> None:
        """One panel: dots over contours in the plane, over exact samples in more dimensions, histograms on the line."""
        x = x[:DRAWN].double()
        if x.shape[1] == 1:
            bins = torch.linspace(float(self.low), float(self.high), 60).tolist()
            place.hist(self.exact[:, 0].tolist(), bins, density=True, histtype="step", color=TRUE)
            place.hist(x[:, 0].tolist(), bins, density=True, color=colour, alpha=0.5)
        elif self.levels is None:
            place.scatter(*self.exact[:DRAWN, :2].T.tolist(), s=1, color=TRUE, linewidths=0)
            place.scatter(*x[:, :2].T.tolist(), s=2, color=colour, alpha=0.5, linewidths=0)
        else:
            place.scatter(*x.T.tolist(), s=2.2, color=colour, alpha=0.55, linewidths=0)
            mesh = [axis.tolist() for axis in self.mesh]
            place.contour(
                *mesh, self.levels.tolist(), levels=self.heights, colors=TRUE, linewidths=0.7, linestyles="solid"
            )
            place.set_aspect("equal")
        place.set_xlim(float(self.low[0]), float(self.high[0]))
        if x.shape[1] > 1:
            place.set_ylim(float(self.low[1]), float(self.high[1]))
        place.set_xticks([])
        place.set_yticks([])
        for spine in place.spines.values():
            spine.set_color("#d0d0d0")


def _curves(figure: Any, found: Comparison) -> None:
    """Left TV, where there are modes, right the ELBO's distance to log Z; both against training seconds."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    kinds = [("tv", "TV of mode weights")] if found.plan.target.modes is not None else []
    kinds += [("gap", "log Z − ELBO, nats")]
    colours = _colours(found)
    places = figure.subplots(1, len(kinds), squeeze=False)[0]
    for place, (kind, label) in zip(places, kinds, strict=True):
        for pair, runs in found.results.items():
            _line(
                place,
                [_points(result, kind, found.plan.clock) for _, result in runs],
                colours[pair],
                " · ".join(_title(found, pair).split("\n")),
            )
        truths = [value for result in found.truth for _, value in _points(result, kind, found.plan.clock)]
        if truths:
            place.axhline(
                sorted(truths)[len(truths) // 2],
                color=TRUE,
                linewidth=1,
                linestyle="--",
                label="truth through the chain",
            )
        if kind == "tv":
            place.axhline(REACHED, color=FAINT, linewidth=0.8, linestyle=":", label=f"TV {REACHED:g}")
        place.set_yscale("log")
        place.set_xlabel("training seconds" if found.plan.clock == "seconds" else "training CPU seconds", fontsize=8)
        place.set_ylabel(label, fontsize=8)
        place.tick_params(labelsize=7, which="both")
        # 0.05 instead of 5 x 10^-2, and only where labels have room.
        place.yaxis.set_major_formatter(FuncFormatter(_plain))
        place.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        place.yaxis.set_minor_formatter(FuncFormatter(_plain))
        place.grid(True, which="major", color="#ececec", linewidth=0.6)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    legend = figure.legend(*places[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _points(result: Result, kind: str, clock: str) -> list[tuple[float, float]]:
    """(seconds, value) of every look and of the end."""
    log_z = result.numbers["exact_log_z"]

    def value(point: Mapping[str, Any]) -> float:
        return float(point["tv"]) if kind == "tv" else max(1e-4, float(log_z - point["elbo"]))

    return [(float(point.get(clock, 0.0)), value(point)) for point in [*result.curve, result.numbers]]


def _line(place: Any, runs: Sequence[Sequence[tuple[float, float]]], colour: Any, label: str) -> None:
    """Median over seeds at their k-th look, its time the median time, and a band from the least to the most."""
    count = min(map(len, runs))
    seconds, values = (torch.tensor([[point[i] for point in run[:count]] for run in runs]) for i in (0, 1))
    x = seconds.median(0).values.tolist()
    place.plot(x, values.median(0).values.tolist(), color=colour, linewidth=1.4, label=label)
    if len(runs) > 1:
        place.fill_between(
            x, values.min(0).values.tolist(), values.max(0).values.tolist(), color=colour, alpha=0.15, linewidth=0
        )
