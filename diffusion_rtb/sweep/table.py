"""A sweep as one table, for the terminal and for table.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from diffusion_rtb.files.plain_text import markdown_text
from diffusion_rtb.files.terminal import shown
from diffusion_rtb.files.whole import write_text

if TYPE_CHECKING:
    from diffusion_rtb.sweep.run import Found

__all__ = ["legend", "table", "write_table"]


def table(found: Found) -> Table:
    """One line for each point, the baseline's after them."""
    columns, rows = _cells(found)
    made = Table(title=shown(f"{found.plan.config.name}: {', '.join(axis.key for axis in found.plan.axes)}"))
    made.title_justify = "left"
    for i, name in enumerate(columns):
        # One word a line: a terminal has 80 columns.
        made.add_column(Text(name.replace(" ", "\n")), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(shown(cell, 60) for cell in row))
    return made


def write_table(found: Found) -> Path:
    """The same as table.md in the sweep's folder."""
    columns, rows = _cells(found)
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *([markdown_text(cell) for cell in row] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    name = markdown_text(found.plan.config.name)
    path = found.plan.folder / "table.md"
    write_text(path, "\n\n".join([f"# {name}", text, *(markdown_text(line) for line in legend(found))]) + "\n")
    return path


def _cells(found: Found) -> tuple[list[str], list[list[str]]]:
    """Titles and rows; columns of which nothing is known are left out."""
    titles = ["point", *COLUMNS]
    rows = [
        [_name(row, f"{found.plan.config.name}-"), *(column(row) for column in COLUMNS.values())] for row in found.rows
    ]
    kept = [i for i in range(len(titles)) if i == 0 or any(row[i] != MISSING for row in rows)]
    return [titles[i] for i in kept], [[row[i] for i in kept] for row in rows]


MISSING = "–"


def _name(row: Mapping[str, Any], common: str) -> str:
    """What its folder's name has besides that of the sweep."""
    own = str(row["name"]).removeprefix(common)
    return f"{own} at {row['iterations']}" if row["kind"] == "early stop" else own


def _number(value: Any, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _reward(row: Mapping[str, Any]) -> str:
    reward = row["reward"]
    if reward is None:
        return MISSING
    half = f" ± {(reward['high'] - reward['low']) / 2:.2f}" if "low" in reward else ""
    return f"{reward['mean']:.2f}{half}"


def _frontier(row: Mapping[str, Any]) -> str:
    known = {name: row.get(f"frontier_{name}") for name in ("kl", "vendi")}
    if all(value is None for value in known.values()):
        return MISSING
    return ", ".join({"kl": "KL", "vendi": "Vendi"}[name] for name, value in known.items() if value) or "no"


def _of_posterior(key: str, digits: int = 2) -> Any:
    """A number that belongs to a beta: none for a baseline that has none."""
    return lambda row: _number(row.get(key), digits) if row["kind"] == "posterior" else MISSING


COLUMNS = {
    "beta": lambda row: f"{row['beta']:g}" if row["kind"] == "posterior" else MISSING,
    "reward": _reward,
    "exact reward": _of_posterior("reward_reweighted"),
    "KL": lambda row: _number(row["kl"]),
    "exact KL": _of_posterior("kl_reweighted"),
    "Vendi": lambda row: _number(row.get("vendi_posterior"), 1),
    "exact Vendi": _of_posterior("vendi_reweighted_prior", 1),
    "strength": _of_posterior("strength"),
    "TV": lambda row: (
        ", ".join(f"{name} {value:.3f}" for name, value in (row.get("tv") or {}).items())
        if row["kind"] == "posterior" and row.get("tv")
        else MISSING
    ),
    "frontier": _frontier,
}
"""Title -> text of a row."""


def legend(found: Found) -> list[str]:
    """What the columns mean, what is not known, and how to go on."""
    lines = ["Exact: prior samples re-weighted by exp(beta·r), what a perfect posterior would show. KL in nats."]
    effective = [row["ess_prior"] for row in found.rows if row["kind"] == "posterior" and row.get("ess_prior")]
    if effective:
        lines.append(
            f"Of them an effective share of {min(effective):.2g} to {max(effective):.2g} carries these numbers."
        )
    apart = [axis.key for axis in found.plan.axes if not axis.comparable]
    if apart:
        lines.append(f"{', '.join(apart)} changes what is measured: the points have no common frontier.")
    else:
        lines.append("Frontier: no other point has as much reward for less KL, or for more diversity (Vendi).")
    lines += _of_baseline(found.rows)
    warm = [f"{row['name']} from {row['start']}" for row in found.rows if row["kind"] == "posterior" and row["start"]]
    if warm:
        lines.append(f"Started from another posterior: {', '.join(warm)}.")
    lines += [f"{name} failed: {why}" for name, why in found.failed.items()]
    if found.failed:
        lines.append("The same command tries the failed ones again, and repeats nothing else.")
    return lines


def _of_baseline(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the baseline's early stops come from, and whether a point beats them."""
    stops = [row for row in rows if row["kind"] == "early stop"]
    if not stops:
        return []
    return [
        f"{stops[0]['name']}, stopped early, is seen in training (its own trajectories of metrics.jsonl, or its rows of watch); "
        "its end is evaluated like the points."
    ]
