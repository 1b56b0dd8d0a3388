"""Several evaluated subjects in one table: a row each, a column for every number that one of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from diffusion_rtb.files.terminal import shown

__all__ = ["common_samples", "comparison"]

LONGEST = 60


def comparison(evaluated: Sequence[Mapping[str, Any]]) -> Table:
    """Reward of both sides, judges, KL, strength and Vendi of each subject; a dash where it was not measured.

    Vendi scores of unequal numbers of samples are left out.
    """
    judges = list(dict.fromkeys(name for numbers in evaluated for name in numbers["judges"]))
    columns: dict[str, tuple[str | int, ...]] = {
        "prior": ("reward", "prior", "mean"),
        "reward": ("reward", "posterior", "mean"),
        **{f"judge {name.rpartition(':')[2]}": ("judges", name, "posterior", "mean") for name in judges},
        "KL": ("kl", "mean"),
        "strength": ("strength", "slope", "mean"),
    }
    if count := common_samples([numbers["overall"] for numbers in evaluated]):
        columns[f"Vendi of {count}"] = ("diversity", "posterior", "vendi")
    rows = [[_number(numbers["overall"], names) for names in columns.values()] for numbers in evaluated]
    there = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    table = Table(title=shown("All subjects"), title_justify="left")
    for title in ("subject", *(list(columns)[i] for i in there)):
        table.add_column(shown(title, LONGEST), justify="left" if title == "subject" else "right")
    for numbers, row in zip(evaluated, rows, strict=True):
        table.add_row(shown(numbers["subject"]["name"], LONGEST), *(shown(row[i]) for i in there))
    return table


def common_samples(overall: Sequence[Mapping[str, Any]]) -> int | None:
    """Of how many samples a prompt all Vendi scores are: they grow with them, and compare at equal numbers only. None: unequal."""
    counts = {each["diversity"].get("samples") for each in overall if each.get("diversity")}
    return counts.pop() if len(counts) == 1 else None


def _number(tree: Any, names: Sequence[str | int]) -> str:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return f"{tree:.3g}" if isinstance(tree, int | float) else "-"
