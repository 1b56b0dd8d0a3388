"""What a comparison found: its plan, its samplers' runs, and the medians of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_rtb.comparison.cost import Budget, Cost
from diffusion_rtb.comparison.truths.truth import Looks, Result, Truth
from diffusion_rtb.comparison.variants import Cell
from diffusion_rtb.config.load import RunConfig

__all__ = ["REACHED", "Comparison", "Plan", "cost_to", "median_run"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is going to be run; everything about it was checked that can be without drawing a sample."""

    config: RunConfig
    """What every run starts from."""
    folder: Path
    cells: Sequence[Cell]
    """Runs, without those of refused pairs."""
    refused: dict[tuple[str, str], str]
    """Objective and behaviour -> why they do not fit."""
    looks: Looks
    cost: Cost
    """What the figure's curves are against."""
    truth: Truth
    budget: Budget | None = None


@dataclass(eq=False)
class Comparison:
    """What was measured so far."""

    plan: Plan
    results: dict[tuple[str, str], list[tuple[int, Result]]] = field(default_factory=dict)
    """Objective and behaviour -> seed and result of each of its runs that is finished."""

    diverged: dict[tuple[str, str, int], str] = field(default_factory=dict)
    """Objective, behaviour and seed -> where and how, of runs that came to no end."""

    @property
    def complete(self) -> bool:
        return sum(map(len, self.results.values())) + len(self.diverged) == len(self.plan.cells)


REACHED = 0.05
"""The TV whose first look the table tells."""


def cost_to(curve: Sequence[Mapping[str, Any]], cost: str = "seconds", tv: float = REACHED) -> float | None:
    """The cost at the first look with at most this total variation; None: not reached, or not looked at."""
    return next((point[cost] for point in curve if "tv" in point and cost in point and point["tv"] <= tv), None)


ORDER = (("tv", 1.0), ("w2", 1.0), ("elbo", -1.0), ("reward", -1.0))
"""What runs of one sampler are ordered by, worse numbers larger once multiplied."""


def median_run(results: Sequence[Result]) -> Result:
    """The run of median TV, or, where that was not measured, of median W2, ELBO or reward; of two the better."""

    def worse(result: Result) -> float:
        n = result.numbers
        return next(sign * float(n[name]) for name, sign in ORDER if name in n)

    ordered = sorted(results, key=worse)
    return ordered[(len(ordered) - 1) // 2]
