"""metrics.jsonl: one row of JSON for each iteration, on the disk before the checkpoint that counts it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusion_rtb.files.whole import explained, write_text

__all__ = ["METRICS", "append_row", "curve", "cut_rows", "read_rows"]

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


def append_row(path: Path, iteration: int, metrics: Mapping[str, float]) -> None:
    """Write an iteration's row through to the disk: a checkpoint that counts the iteration must not outlive it.

    Raises:
        DiskError: there is no room.
    """
    # JSON has no NaN: what was not measured is null.
    row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"iteration": iteration, **row}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """The rows by iteration, in that order, and how many lines are none; of a doubled row the last one counts."""
    rows, damaged = {}, 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in filter(None, map(str.strip, lines)):
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return dict(sorted(rows.items())), damaged


STRETCHES = 8
"""Points of a training's curve where nothing was watched."""


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reward, KL (nats) and Vendi score of so many `samples` along a training, where it could be stopped: of its `watch/*` rows.

    Without such rows reward and KL are means of the iterations' own trajectories over `STRETCHES` equal stretches, each with the
    `iterations` done at its end, and there is no Vendi score.
    """
    watched = [row for row in rows if row.get("watch/reward") is not None]
    if watched:
        return [
            {"iterations": row["iteration"]}
            | {key: row.get(f"watch/{key}") for key in ("reward", "kl", "vendi", "samples")}
            for row in watched
        ]
    measured = [row for row in rows if row.get("reward") is not None and row.get("kl") is not None]
    count = min(STRETCHES, len(measured))
    found = []
    for first, last in pairwise(k * len(measured) // max(count, 1) for k in range(count + 1)):
        part = measured[first:last]
        means = {key: sum(row[key] for row in part) / len(part) for key in ("reward", "kl")}
        found.append({"iterations": part[-1]["iteration"] + 1} | means | {"vendi": None, "samples": None})
    return found


def cut_rows(path: Path, iteration: int, *, whole: bool = True) -> None:
    """Forget the rows of iterations that are going to be repeated, from `iteration` on, and say which earlier ones are missing.

    Not so where the file is not `whole`, with a row of each iteration.
    """
    rows, damaged = read_rows(path)
    if rows or damaged:
        write_text(path, "".join(json.dumps(row) + "\n" for number, row in rows.items() if number < iteration))
    missing = [number for number in range(iteration) if number not in rows]
    if missing and whole:
        read = f" {damaged} of its lines could not be read." if damaged else ""
        log.warning(
            "%s has no row of %s, which the checkpoint of iteration %d counts: they were lost, and training goes on.%s",
            path,
            spans(missing),
            iteration,
            read,
        )


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as people write them: iterations 3, 5–9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [f"{a}" if a == b else f"{a}–{b}" for a, b in found]
    return f"iteration{'s' if shown[1:] or '–' in shown[0] else ''} {', '.join(shown)}"
