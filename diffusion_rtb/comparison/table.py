"""A comparison as tables: one row per sampler with median and range over seeds, and one per run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_rtb.comparison.cost import TITLES, WATCHED
from diffusion_rtb.comparison.results import REACHED, Comparison, cost_to
from diffusion_rtb.comparison.truths.truth import Result
from diffusion_rtb.files.plain_text import markdown_text
from diffusion_rtb.files.whole import write_text

__all__ = ["Row", "markdown", "rows", "write_tables"]


@dataclass(frozen=True)
class Column:
    """One number of a sampler."""

    name: str
    """In files."""
    title: str
    """In the table people read."""
    digits: int


COLUMNS = (
    Column("tv", "TV", 3),
    Column("off_percent", "off, %", 2),
    Column("w2", "W2", 3),
    Column("w2_error", "W2, standard error", 3),
    Column("w2_per_floor", "W2 / floor", 2),
    Column("elbo_gap", "ELBO − log Z", 3),
    Column("elbo", "ELBO", 3),
    Column("elbo_error", "ELBO, standard error", 3),
    Column("strength", "strength", 2),
    Column("r2", "r²", 2),
    Column("reward", "reward", 3),
    Column("kl", "KL", 3),
    Column("kl_error", "KL, standard error", 3),
    Column("ess", "ESS", 2),
    Column("vendi", "Vendi", 1),
    Column("distance", "distance", 3),
    Column("log_z", "log Z estimate", 3),
    Column("network_calls", "network calls", 0),
    Column("reward_calls", "reward calls", 0),
    Column("seconds", "training s", 0),
    Column("cpu_seconds", "training CPU s", 0),
    Column("memory", "memory, MiB", 0),
    Column("cost_to_tv", f"to TV {REACHED:g}", 0),
)
FILES_ONLY = {"elbo", "w2_error", "elbo_error", "kl_error", "r2", "log_z"}
"""Columns of the files alone."""


@dataclass(frozen=True)
class Row:
    """One sampler over its seeds."""

    objective: str
    behaviour: str
    runs: Sequence[tuple[int, Mapping[str, float]]]
    """Seed and numbers by name of column; what was not measured is absent."""

    def values(self, column: str) -> list[float]:
        """The numbers of all seeds that have one."""
        return [numbers[column] for _, numbers in self.runs if column in numbers]


def rows(found: Comparison) -> list[Row]:
    """The references first, then all pairs in the order of the grid; one without a finished run has none."""
    references = [
        Row(one.name, one.kind, [(seed, _numbers(result, found)) for seed, result in one.runs])
        for one in found.plan.truth.references
    ]
    pairs = dict.fromkeys(cell.pair for cell in found.plan.cells)
    return references + [
        Row(*pair, [(seed, _numbers(result, found)) for seed, result in found.results.get(pair, [])]) for pair in pairs
    ]


def _numbers(result: Result, found: Comparison) -> dict[str, float]:
    n, cost = result.numbers, found.plan.cost
    numbers = {c.name: n[c.name] for c in COLUMNS if n.get(c.name) is not None}
    if "off" in n:
        numbers["off_percent"] = 100 * n["off"]
    numbers |= found.plan.truth.derived(n)
    if "elbo" in n:
        numbers["elbo_gap"] = n["elbo"] - n["exact_log_z"]
    reached = cost_to([*result.curve, *([n] if cost in n else [])], cost)
    return numbers if reached is None else numbers | {"cost_to_tv": reached}


def markdown(found: Comparison) -> str:
    """The table, its legend, and what was not run."""
    table = rows(found)
    hidden = FILES_ONLY | {"seconds" if found.plan.cost == "cpu_seconds" else "cpu_seconds"}
    columns = [c for c in COLUMNS if c.name not in hidden and any(row.values(c.name) for row in table)]
    lines = [["objective", "behaviour", "seeds", *(c.title for c in columns)]]
    lines.append(["---", "---", *("---:" for _ in lines[0][2:])])
    for row in table:
        cells = [_cell(row.values(c.name), c.digits, len(row.runs)) for c in columns]
        lines.append([markdown_text(row.objective), markdown_text(row.behaviour), str(len(row.runs)), *cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([f"# {markdown_text(found.plan.config.name)}", text, _legend(found), *_not_run(found)]) + "\n"


def _cell(values: Sequence[float], digits: int, seeds: int) -> str:
    """median [least, most]; a count where not every seed has the number."""
    if not values:
        return "-"
    shown = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        shown += f" [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    return shown if len(values) == seeds else f"{shown} ({len(values)} of {seeds})"


def _legend(found: Comparison) -> str:
    plan, cost = found.plan, TITLES[found.plan.cost]
    sentences = ["Median [least, most] over seeds.", *plan.truth.sentences(plan.looks)]
    if any(row.values("cost_to_tv") for row in rows(found)):
        sentences.append(f"To TV {REACHED:g}: {cost} at the first look, every {_every(found)} iterations, that has it.")
    if plan.budget is not None:
        sentences.append(
            f"A run ended with the iteration that reached {plan.budget.amount:,g} {TITLES[plan.budget.cost]}."
        )
    kind = "; CPU seconds of the process, on all cores" if plan.cost == "cpu_seconds" else ""
    sentences.append(
        f"Training seconds are those of warm-up and iterations, without measuring and checkpoints{kind}. A network call is one "
        f"sample through the denoiser, and three where its gradient is taken; a reward call one picture. Memory is what the "
        f"warm-up and the first {WATCHED} iterations took beyond what was there before."
    )
    return " ".join(sentences)


def _every(found: Comparison) -> int:
    return max(1, round(found.plan.config.train.iterations / max(1, found.plan.looks.points)))


def _not_run(found: Comparison) -> list[str]:
    lines = [f"* {a} with {b} was not run: {markdown_text(reason)}" for (a, b), reason in found.plan.refused.items()]
    lines += [f"* {a} with {b}, seed {seed}, {markdown_text(how)}" for (a, b, seed), how in found.diverged.items()]
    done = sum(map(len, found.results.values()))
    if not found.complete:
        lines.append(f"* Unfinished: {done} of {len(found.plan.cells)} runs; the same command goes on.")
    return ["\n".join(lines)] if lines else []


def write_tables(found: Comparison) -> list[Path]:
    """table.md, table.csv (median, least, most) and runs.csv (one line per run) in the comparison's folder."""
    table, names = rows(found), [c.name for c in COLUMNS]
    summary = [
        ["objective", "behaviour", "seeds", *(f"{n}_{part}" for n in names for part in ("median", "min", "max"))]
    ]
    runs = [["objective", "behaviour", "seed", *names]]
    for row in table:
        summary.append([row.objective, row.behaviour, str(len(row.runs)), *_summary(row, names)])
        for seed, numbers in row.runs:
            runs.append([row.objective, row.behaviour, str(seed), *(str(numbers.get(n, "")) for n in names)])
    texts = {"table.md": markdown(found), "table.csv": _csv(summary), "runs.csv": _csv(runs)}
    for name, text in texts.items():
        write_text(found.plan.folder / name, text)
    return [found.plan.folder / name for name in texts]


def _summary(row: Row, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        values = row.values(name)
        yield from (str(f(values)) if values else "" for f in (statistics.median, min, max))


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
