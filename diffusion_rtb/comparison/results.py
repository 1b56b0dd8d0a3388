"""What a comparison found: its plan, its samplers' runs, and the medians of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffusion_rtb.comparison.transport import Distance
from diffusion_rtb.comparison.variants import Cell
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget
from diffusion_rtb.interfaces import Prior

__all__ = ["PICTURED", "REACHED", "Comparison", "Looks", "Plan", "Result", "median_run", "seconds_to"]

Clock = Literal["seconds", "cpu_seconds"]
"""Seconds on the wall, or of this process on all cores, which say more where the machine is shared."""


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
    clock: Clock
    prior: Prior
    target: ExactTarget


@dataclass(eq=False)
class Comparison:
    """What was measured so far."""

    plan: Plan
    floor: Distance
    truth: list[Result] = field(default_factory=list)
    """One for each seed; none where no denoiser is the truth's."""
    results: dict[tuple[str, str], list[tuple[int, Result]]] = field(default_factory=dict)
    """Objective and behaviour -> seed and result of each of its runs that is finished."""

    @property
    def complete(self) -> bool:
        return sum(map(len, self.results.values())) == len(self.plan.cells)


PICTURED = 2000
"""Samples kept for the figure."""


@dataclass(frozen=True)
class Looks:
    """How a comparison measures."""

    samples: int = 40_000
    """Samples of each sampler, at the end."""
    points: int = 25
    """Looks at the posterior while it is trained."""
    point_samples: int = 4000
    """Samples of one such look."""


@dataclass(frozen=True, eq=False)
class Result:
    """A sampler that was measured."""

    numbers: Mapping[str, Any]
    """See `measured`; of a trained one also iterations, seconds and cpu_seconds."""
    curve: list[dict[str, Any]]
    """Looks while it was trained."""
    samples: Tensor
    """A few, for the figure; (kept, dim)."""


REACHED = 0.05
"""The TV whose first second the table tells."""


def seconds_to(curve: Sequence[Mapping[str, Any]], clock: str = "seconds", tv: float = REACHED) -> float | None:
    """Training seconds at the first look with at most this total variation; None: not reached, or not looked at."""
    return next((point[clock] for point in curve if "tv" in point and point["tv"] <= tv), None)


def median_run(results: Sequence[Result]) -> Result:
    """The run of median TV, or of median W2 where there are no modes; of two the better."""
    ordered = sorted(results, key=lambda result: result.numbers.get("tv", result.numbers["w2"]))
    return ordered[(len(ordered) - 1) // 2]
