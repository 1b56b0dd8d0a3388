"""Train and evaluate the points of a sweep one after the other; the same command goes on where it was interrupted.

OUT/NAME-LABEL/          the points, ordinary runs with eval/
OUT/NAME-ddpo/           the baseline, with all its checkpoints
OUT/NAME-sweep/          sweep.json (all numbers), table.md, index.html
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.lock import LOCK, folder_lock
from diffusion_rtb.files.whole import clear_unfinished, write_json
from diffusion_rtb.run.checkpoint_reading import latest_state
from diffusion_rtb.run.folder import CHECKPOINTS, RunFolderError, run_folder
from diffusion_rtb.sweep.plan import Plan
from diffusion_rtb.sweep.results import baseline_rows, mark_frontier, point_row
from diffusion_rtb.training.assemble import training

__all__ = ["SHEET", "Found", "SweepStoppedError", "run"]

SHEET = "sweep.json"

Evaluate = Callable[[Path, Sequence[str]], object]


class SweepStoppedError(RuntimeError):
    """A signal ended a run of the sweep before its last iteration; what is done is kept."""


@dataclass
class Found:
    """What a sweep has so far."""

    plan: Plan
    evaluate: Evaluate
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each finished point, then those of the baseline; see `results.py`."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a run -> why it failed."""

    @property
    def folders(self) -> list[Path]:
        """Of the evaluated runs, for the page."""
        return [Path(row["folder"]) for row in self.rows if row["kind"] != "early stop"]


def run(work: Plan, tell: Callable[[str], None], evaluate: Evaluate) -> Found:
    """Train and evaluate what is not finished yet; a run that fails is named, and the others go on.

    Args:
        work: The plan.
        tell: Told in one line what is going on.
        evaluate: `evaluate_run`, which writes eval/ of a run, with overrides of its config.

    Raises:
        SweepStoppedError: a signal came.
        FolderInUseError: another command does the same sweep.
    """
    with _held(work):
        found, done = Found(work, evaluate), list[int]()
        known = _evaluated(work)
        for place, point in enumerate(work.points):
            config = work.settled(place, done)
            numbers = _attempt(config, known, found, tell, f"{place + 1}/{len(work.points)}: {point.label}")
            if _trained(config):
                done.append(place)
            if numbers is not None:
                found.rows.append(point_row(config, run_folder(config), point, numbers))
                _write(found, known)
        if work.baseline is not None:
            numbers = _attempt(work.baseline, known, found, tell, f"baseline: {work.baseline.objective.component}")
            if numbers is not None:
                found.rows += baseline_rows(work.baseline, run_folder(work.baseline), numbers)
        mark_frontier(found.rows, work.axes)
        _write(found, known)
        return found


def _attempt(
    config: RunConfig, known: dict[str, Any], found: Found, tell: Callable[[str], None], what: str
) -> dict[str, Any] | None:
    """The evaluation of a run, trained first if it has to be; None where that failed, which is noted."""
    folder = run_folder(config)
    try:
        if not _trained(config):
            tell(
                f"{what}: {f'from {config.start}, ' if config.start else ''}{config.train.iterations} iterations in {folder}"
            )
            _train(config, folder)
        if known.get(config.name) != _asked(config) or _numbers(folder) is None:
            tell(f"{what}: evaluating {folder}")
            with redirect_stdout(io.StringIO()):  # the sweep has one table for all
                found.evaluate(folder, [f"eval={json.dumps(config.eval.model_dump(mode='json'))}"])
        else:
            tell(f"{what} is finished")
        known[config.name] = _asked(config)
        return _numbers(folder)
    except SweepStoppedError:
        raise
    except Exception as error:  # noqa: BLE001 — a reward may raise anything; the other points do not depend on it
        known.pop(config.name, None)
        found.failed[config.name] = f"{type(error).__name__}: {error}"
        tell(f"{what} failed, the others go on: {found.failed[config.name]}")
        return None


def _train(config: RunConfig, folder: Path) -> None:
    with training(config, folder) as trainer:
        trainer.fit()
        if trainer.interrupted:
            raise SweepStoppedError(f"Stopped after {trainer.iteration} iterations of {folder}.")


def _trained(config: RunConfig) -> bool:
    held = latest_state(run_folder(config) / CHECKPOINTS)
    return held is not None and int(held[1]["iteration"]) >= config.train.iterations


def _asked(config: RunConfig) -> dict[str, Any]:
    """What an evaluation depends on besides the posterior: another one is done anew."""
    return {"eval": config.eval.model_dump(mode="json"), "iterations": config.train.iterations}


def _numbers(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / "eval" / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _held(work: Plan) -> Iterator[None]:
    """Make the sweep's folder; nobody else writes there in the block.

    Raises:
        RunFolderError: it is something else.
    """
    folder = work.folder
    if folder.exists() and not (folder / SHEET).is_file():
        others = [folder.name] if folder.is_file() else [file.name for file in folder.iterdir() if file.name != LOCK]
        if others:
            raise RunFolderError(
                f"{folder} exists and is not a sweep's folder: it has no {SHEET}. Choose another name (name=...), or delete it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        clear_unfinished(folder)
        yield


def _evaluated(work: Plan) -> dict[str, Any]:
    """What earlier calls have evaluated, by name of the run; nothing where their file is damaged."""
    try:
        held = json.loads((work.folder / SHEET).read_text(encoding="utf-8"))["evaluated"]
        return {str(name): asked for name, asked in held.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(found: Found, known: Mapping[str, Any]) -> None:
    work = found.plan
    axes = {axis.key: list(axis.values) for axis in work.axes}
    write_json(
        work.folder / SHEET,
        {"schema": 1, "name": work.config.name, "axes": axes, "warm_iterations": work.warm}
        | {"points": found.rows, "failed": found.failed, "evaluated": dict(known)},
    )
