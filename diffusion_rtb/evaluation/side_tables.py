"""Prior, re-weighted prior and posterior one below the other: the re-weighted prior is what a perfect model would show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.files.terminal import shown

__all__ = ["SIDES", "side_tables"]

SIDES = ("prior", "reweighted_prior", "posterior")
"""Keys of a metric's value, in the order of the rows."""

NAMED = 17
"""Characters of the first column."""


def side_tables(numbers: Mapping[str, Any], metrics: Sequence[Metric], width: int) -> list[Table]:
    """What `Metric.card` says of each side, over all prompts, in as many tables of this width as it takes."""
    found = numbers | numbers["overall"]
    columns: dict[str, list[str]] = {}
    for metric in metrics:
        if found.get(metric.name) is not None:
            for label, values in metric.card(found[metric.name]).items():
                columns[label] = [_cell(values.get(side)) for side in SIDES]
    names = [name for name, there in zip(_names(numbers), _there(columns), strict=True) if there]
    return [_table(numbers, names, part) for part in _parts(columns, width)]


def _there(columns: Mapping[str, Sequence[str]]) -> list[bool]:
    """Which sides have any number."""
    return [any(cells[i] != "–" for cells in columns.values()) for i in range(len(SIDES))]


def _names(numbers: Mapping[str, Any]) -> list[str]:
    """Of the rows; how many of the prior's samples count once they are re-weighted, comes with them."""
    ess, count = numbers["overall"].get("ess"), numbers["samples"]["prior"]
    few = f"\nESS {ess['prior'] * count:.0f} of {count}" if ess is not None else ""
    return ["prior", f"re-weighted prior{few}", "posterior"]


def _cell(value: Any) -> str:
    """A number, its interval below it."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        mean, low, high = (value.get(end) for end in ("mean", "low", "high"))
        ends = "" if low is None or high is None else f"\n[{_short(low)}, {_short(high)}]"
        return "–" if mean is None else f"{_short(mean)}{ends}"
    return _short(value) if isinstance(value, int | float) else str(value)


def _short(value: float) -> str:
    """Three digits, and not more decimals than two."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _width(label: str, cells: Sequence[str]) -> int:
    lines = [line for cell in cells for line in cell.splitlines()]
    return max(len(text) for text in [*lines, *label.split()])


def _parts(columns: Mapping[str, Sequence[str]], width: int) -> list[dict[str, Sequence[str]]]:
    """The columns that fit beside each other, in order."""
    parts: list[dict[str, Sequence[str]]] = []
    left = 0
    for label, cells in columns.items():
        needed = _width(label, cells) + 3
        if not parts or needed > left:
            parts.append({})
            left = width - NAMED - 4
        parts[-1][label] = cells
        left -= needed
    return parts


def _table(numbers: Mapping[str, Any], names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    beta = numbers["beta"]
    title = "All prompts" if beta is None else f"All prompts, beta {beta:.3g}"
    table = Table(title=shown(title), title_justify="left")
    table.add_column(min_width=NAMED, max_width=NAMED)
    for label, cells in columns.items():
        wide = _width(label, cells)
        table.add_column(shown(label), justify="right", min_width=wide, max_width=wide)
    for i, (key, name) in enumerate(zip(SIDES, _names(numbers), strict=True)):
        if name in names:
            # Line breaks are ours; what comes from others is in labels only.
            table.add_row(name, *(cells[i] for cells in columns.values()), style="bold" if key == "posterior" else "")
    return table
