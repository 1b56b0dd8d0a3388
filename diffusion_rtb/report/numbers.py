"""Numbers out of metrics.json: found by their names, None where they were not measured, and written so that columns align."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Estimate", "at", "decimals", "estimate", "flat", "number", "of_samples", "text"]

MINUS, NARROW = "\u2212", "\u202f"


@dataclass(frozen=True)
class Estimate:
    """A number and, where it is known, its interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def reach(self) -> tuple[float, float] | None:
        """From the mean down to the low end and up to the high one."""
        return None if self.low is None or self.high is None else (self.mean - self.low, self.high - self.mean)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0; 0 where it holds 0 or is not known."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def text(self, places: int | None = None, *, signed: bool = False) -> str:
        """As 1.23 [1.10, 1.36]."""
        places = decimals([self.mean, self.low, self.high]) if places is None else places
        shown = text(self.mean, places, signed=signed)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{text(self.low, places)}, {text(self.high, places)}]"


def at(tree: Any, *names: str | int) -> Any:
    """What lies under these names; None where one of them is missing."""
    for name in names:
        keys = tree.keys() if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ()
        if name not in keys:
            return None
        tree = tree[name]
    return tree


def number(tree: Any, *names: str | int) -> float | None:
    """The finite number under these names; of one with an interval the mean."""
    found = at(tree, *names)
    found = found.get("mean") if isinstance(found, Mapping) else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def estimate(tree: Any, *names: str | int) -> Estimate | None:
    """The number under these names with its interval: {mean, low, high}, or {mean, standard_error} as mean ± 1.96 errors."""
    found = at(tree, *names)
    mean = number(found, "mean")
    if mean is None:
        alone = number(tree, *names)
        return None if alone is None else Estimate(alone)
    error, low, high = (number(found, key) for key in ("standard_error", "low", "high"))
    if error is not None and low is None and high is None:
        return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error)
    return Estimate(mean, low, high)


def of_samples(trees: Iterable[Any], *names: str | int) -> str:
    """The number under these names of all trees as ` of 8`, as ` of 8 to 64` where they differ; nothing where nobody knows.

    It stands behind the word Vendi: such a score grows with the number of samples.
    """
    counts = {count for tree in trees if (count := number(tree, *names)) is not None}
    ends = dict.fromkeys((min(counts), max(counts))) if counts else ()
    return f" of {' to '.join(f'{count:.0f}' for count in ends)}" if ends else ""


def decimals(values: Iterable[float | None]) -> int:
    """Decimal places that show the largest of the values with about three digits; the same for a whole column. Counts have none."""
    known = [abs(value) for value in values if value is not None]
    if known and all(value.is_integer() for value in map(float, known)):
        return 0
    largest = max(known, default=0.0)
    if not 1e-12 < largest < 1e12:
        return 2
    return min(8, max(0, 2 - math.floor(math.log10(largest))) if largest < 1000 else 0)


def text(value: float | None, places: int = 2, *, signed: bool = False) -> str:
    """With a real minus sign; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    shown = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if float(shown) == 0:
        shown = shown.replace("-", "+" if signed else "")
    return shown.replace("-", MINUS)


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its names joined by dots; a list of numbers is one leaf."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        for index, value in enumerate(tree):
            yield from flat(value, f"{name}.{index}")
    else:
        yield name, tree
