"""Samples of each sampler over the density that is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.comparison.curves import FAINT, INK, TRUE, colours, title
from diffusion_rtb.comparison.results import Comparison, median_run
from diffusion_rtb.comparison.truths.known import KnownTruth
from diffusion_rtb.comparison.truths.truth import Result

__all__ = ["Panels"]

WIDTH = 6
"""Panels in one row, at most."""

PANEL, TEXT = 2.5, 0.65
"""Inches: a panel's side, the height of the words above and below it."""

DRAWN = 1500
"""Samples in a panel."""


class Panels:
    """Exact samples, the truth through the chain, then one panel per objective and behaviour.

    Args:
        found: What is shown.
        truth: Its truth.
    """

    def __init__(self, found: Comparison, truth: KnownTruth) -> None:
        self.panels = _panels(found, truth)
        self.lines = math.ceil(len(self.panels) / WIDTH)
        self.columns = math.ceil(len(self.panels) / self.lines)
        self.frame = _Frame(truth)

    @property
    def size(self) -> tuple[float, float]:
        """Inches in width and height."""
        return self.columns * PANEL, self.lines * (PANEL * self.frame.ratio + TEXT)

    def draw(self, figure: Any) -> None:
        """Into a figure of that size."""
        axes = figure.subplots(self.lines, self.columns, squeeze=False).flatten()
        for place, (name, note, x, colour) in zip(axes, self.panels, strict=False):
            self.frame.draw(place, x, colour)
            # A name is a name, also with dollars in it.
            place.set_title(name, fontsize=9, color=INK, pad=3, parse_math=False)
            place.set_xlabel(note, fontsize=8, color=FAINT, labelpad=3)
        for place in axes[len(self.panels) :]:
            place.set_axis_off()


def _panels(found: Comparison, truth: KnownTruth) -> list[tuple[str, str, Tensor, Any]]:
    """Title, note, samples and colour of each panel; of several seeds the one whose TV, or else W2, is the median."""
    exact = truth.target.sample(DRAWN, torch.Generator().manual_seed(seed_of(0, "figure")))
    panels: list[tuple[str, str, Tensor, Any]] = [("exact samples", "", exact, INK)]
    for reference in truth.references:
        shown = median_run([result for _, result in reference.runs])
        panels.append((f"{reference.name} through the chain", _note(shown), shown.samples, INK))
    colour = colours(found)
    for pair, runs in found.results.items():
        result = median_run([result for _, result in runs])
        panels.append((title(found, pair), _note(result), result.samples, colour[pair]))
    return panels


def _note(result: Result) -> str:
    n = result.numbers
    if "tv" in n:
        return f"TV {n['tv']:.3f}, off {100 * n['off']:.2f} %"
    return f"W2 {n['w2']:.3f}" + (f", ELBO {n['elbo']:.3f}" if "elbo" in n else "")


class _Frame:
    """What all panels share: the region of the plane, and the contours of the true density where it is known there."""

    def __init__(self, truth: KnownTruth) -> None:
        target = truth.target
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
