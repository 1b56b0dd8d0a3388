"""A comparison as one picture: samples over the true density, where it is known, and how fast each came near the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_rtb.comparison.curves import draw_curves
from diffusion_rtb.comparison.panels import Panels
from diffusion_rtb.comparison.results import Comparison
from diffusion_rtb.comparison.truths.known import KnownTruth
from diffusion_rtb.files.whole import whole

__all__ = ["draw_figure"]

CURVES, NARROWEST = 3.4, 9.0
"""Inches: the height of the curves, and their least width."""


def draw_figure(found: Comparison) -> Path:
    """Write figure.png into the comparison's folder and return its path.

    Where the posterior is known a panel of samples for each sampler, see `Panels`. Below them the curves: median over seeds, and
    their range as a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    truth = found.plan.truth
    panels = Panels(found, truth) if isinstance(truth, KnownTruth) else None
    width, height = (0.0, 0.0) if panels is None else panels.size
    figure = Figure(figsize=(max(width, NARROWEST), height + CURVES), dpi=130, layout="constrained")
    if panels is None:
        draw_curves(figure, found)
    else:
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, CURVES])
        panels.draw(parts[0])
        draw_curves(parts[1], found)
    path = found.plan.folder / "figure.png"
    FigureCanvasAgg(figure)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight", pad_inches=0.1)
    return path
