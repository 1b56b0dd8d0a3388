"""What a comparison holds samplers against, and what it knows of each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["PICTURED", "Looks", "Reference", "Result", "Truth"]

PICTURED = 2000
"""Samples kept for the figure."""


@dataclass(frozen=True)
class Looks:
    """How a comparison measures; samples are those of a prompt where the truth is of each prompt."""

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
    """What its truth says of it; of a trained one also iterations and costs."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Looks while it was trained."""
    samples: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """A few, for the figure; (kept, dim); of pictures none."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A sampler that nobody trains, to read the others by."""

    name: str
    kind: str
    runs: Sequence[tuple[int, Result]]
    """Seed and result."""


class Truth(ABC):
    """The posterior as it should be."""

    defaults: Looks
    """How it is held against others if nobody says."""
    references: Sequence[Reference] = ()
    """Rows above the trained ones, the truth's own first where it has one; once it is prepared."""

    @property
    @abstractmethod
    def log_z(self) -> float:
        """log E_p[exp(beta·r)]; nats."""

    @abstractmethod
    def prepare(self, folder: Path, looks: Looks, seeds: Mapping[int, RunConfig], tell: Callable[[str], None]) -> None:
        """Measure what is needed of the truth itself, from wherever that was left; before anything is held against it.

        Args:
            folder: The comparison's.
            looks: How it measures.
            seeds: A config of each seed.
            tell: Told in one line what is going on.
        """

    @abstractmethod
    def look(self, sampler: Sampler, config: RunConfig, count: int) -> dict[str, float]:
        """What a curve shows of a posterior: elbo, reward, kl; tv where shares can be counted."""

    @abstractmethod
    def measured(self, sampler: Sampler, config: RunConfig, count: int) -> tuple[dict[str, Any], Tensor]:
        """All numbers of a posterior as plain JSON values, by the names of the table's columns, and samples for the figure.

        Always there: elbo, exact_log_z, ess, kl, reward, strength (None where it cannot be told).
        """

    def derived(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """Further columns, from what was measured."""
        return {}

    @abstractmethod
    def sentences(self, looks: Looks) -> list[str]:
        """What the reader of the table has to know."""
