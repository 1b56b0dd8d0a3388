"""The numbers of a sweep's points, read from the files of ordinary runs, and which of them no other point beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.manifest import started_from
from diffusion_rtb.run.metrics_file import METRICS, read_rows
from diffusion_rtb.sweep.axes import Axis, Point

__all__ = ["WINDOWS", "baseline_rows", "early_stops", "mark_frontier", "point_row", "undominated"]

WINDOWS = 8
"""Points of a baseline's curve, where its metrics.jsonl has no rows of `watch`."""


def point_row(config: RunConfig, folder: Path, point: Point, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A point as sweep.json has it: its values, and what its evaluation found."""
    return {"kind": "posterior", "values": dict(point.values)} | _of_run(config, folder, numbers)


def baseline_rows(config: RunConfig, folder: Path, numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The baseline at its end, as evaluated, and where it could have been stopped, as it was seen in training."""
    end = {"kind": "baseline", "values": {}} | _of_run(config, folder, numbers)
    rows, _ = read_rows(folder / METRICS)
    stops = [
        {"kind": "early stop", "values": {}, "name": config.name, "folder": str(folder)} | stop
        for stop in early_stops(list(rows.values()))
    ]
    return [*stops, end]


def _of_run(config: RunConfig, folder: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    overall = numbers["overall"]
    reward, kl, diversity = (overall.get(name) or {} for name in ("reward", "kl", "diversity"))
    rows, _ = read_rows(folder / METRICS)
    started = started_from(folder)
    spent = sum(v for row in rows.values() for k, v in row.items() if k.startswith("seconds/") and v is not None)
    return {
        "name": config.name,
        "folder": str(folder),
        "start": None if started is None else started["name"],
        "iterations": numbers["run"]["iterations_done"],
        "training_seconds": spent,
        "beta": numbers["beta"],
        "reward": reward.get("posterior"),
        "reward_prior": reward.get("prior"),
        "reward_reweighted": _mean(reward.get("reweighted_prior")),
        "kl": kl.get("mean"),
        "kl_error": kl.get("standard_error"),
        "kl_reweighted": _mean(kl.get("reweighted_prior")),
        **{f"vendi_{side}": (diversity.get(side) or {}).get("vendi") for side in SIDES},
        "strength": _mean((overall.get("strength") or {}).get("slope")),
        "ess_prior": (overall.get("ess") or {}).get("prior"),
        "tv": {check["factor"]: check["tv"]["mean"] for check in numbers.get("posterior_check") or []},
    }


def _mean(value: Any) -> Any:
    """A number that may come with its interval."""
    return value["mean"] if isinstance(value, Mapping) else value


SIDES = ("prior", "posterior", "reweighted_prior")


def early_stops(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reward, KL and diversity along a training: of its `watch/*` rows, else means of metrics.jsonl over `WINDOWS` equal stretches.

    A stretch is called after its last iteration; KL in nats.
    """
    watched = [row for row in rows if row.get("watch/reward") is not None]
    if watched:
        return [
            {
                "iterations": int(row["iteration"]) + 1,
                "reward": {"mean": row["watch/reward"]},
                "kl": row.get("watch/kl"),
                "vendi_posterior": row.get("watch/vendi"),
            }
            for row in watched
        ]
    measured = [row for row in rows if row.get("reward") is not None and row.get("kl") is not None]
    count = min(WINDOWS, len(measured))
    cuts = [k * len(measured) // count for k in range(count + 1)] if count else [0]
    found = []
    for first, last in pairwise(cuts):
        part = measured[first:last]
        means = {key: sum(row[key] for row in part) / len(part) for key in ("reward", "kl")}
        stop = {"iterations": int(part[-1]["iteration"]) + 1, "reward": {"mean": means["reward"]}, "kl": means["kl"]}
        found.append(stop | {"vendi_posterior": None})
    return found


def mark_frontier(rows: Sequence[dict[str, Any]], axes: Sequence[Axis]) -> None:
    """Say of each row whether no other has at least its reward for at most its KL (`frontier_kl`), or for at least its Vendi score
    (`frontier_vendi`); None where that cannot be compared.
    """
    comparable = all(axis.comparable for axis in axes)
    for cost, sign in (("kl", 1.0), ("vendi_posterior", -1.0)):
        known = [row for row in rows if comparable and row.get("reward") is not None and row.get(cost) is not None]
        best = undominated([(row["reward"]["mean"], sign * row[cost]) for row in known])
        name = f"frontier_{cost.partition('_')[0]}"
        for row in rows:
            row[name] = None
        for row, kept in zip(known, best, strict=True):
            row[name] = kept


def undominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (gain, cost) pairs: whether no other has at least the gain for at most the cost, and one of them better."""
    return [not any(g >= gain and c <= cost and (g, c) != (gain, cost) for g, c in points) for gain, cost in points]
