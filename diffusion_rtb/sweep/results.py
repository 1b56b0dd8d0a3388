"""The numbers of a sweep's points, read from the files of ordinary runs, and which of them no other point beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.manifest import started_from
from diffusion_rtb.run.metrics_file import METRICS, curve, read_rows
from diffusion_rtb.sweep.axes import Axis, Point

__all__ = ["baseline_rows", "mark_frontier", "point_row", "undominated"]


def point_row(config: RunConfig, folder: Path, point: Point, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A point as sweep.json has it: its values, and what its evaluation found."""
    return {"kind": "posterior", "values": dict(point.values)} | _of_run(config, folder, numbers)


def baseline_rows(config: RunConfig, folder: Path, numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The baseline at its end, as evaluated, and where it could have been stopped, as it was seen in training."""
    end = {"kind": "baseline", "values": {}} | _of_run(config, folder, numbers)
    rows, _ = read_rows(folder / METRICS)
    # A Vendi score grows with the number of samples, and is of one space.
    count = min(config.eval.samples, config.eval.prior_samples)
    same_space = config.watch is not None and config.watch.embedder == config.eval.embedder
    stops = [
        {"kind": "early stop", "values": {}, "name": config.name, "folder": str(folder)}
        | {"iterations": stop["iterations"], "reward": {"mean": stop["reward"]}, "kl": stop["kl"]}
        | {"vendi_posterior": stop["vendi"] if same_space and stop["samples"] == count else None}
        for stop in curve(list(rows.values()))
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
