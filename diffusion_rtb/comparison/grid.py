"""A whole comparison in one folder: checked first, then run seed by seed; the same command goes on where it was interrupted.

OUT/NAME-compare/
    comparison.json                     what it is a comparison of
    truth/SEED/                         the truth as a sampler
    runs/OBJECTIVE.BEHAVIOUR.SEED/      a run's folder each, with measures.json and curve.jsonl
    table.md, table.csv, runs.csv, figure.png
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_rtb.assemble import check_components
from diffusion_rtb.comparison.exact import ExactTarget, exact_target
from diffusion_rtb.comparison.runner import (
    Looks,
    Result,
    check_same,
    finished,
    measure_truth,
    train_and_measure,
)
from diffusion_rtb.comparison.variants import Cell, cells, comparison_folder, load_variants
from diffusion_rtb.comparison.wasserstein import BLOCK, Distance, check_transport, floor
from diffusion_rtb.config import RunConfig, config_diff, load_config
from diffusion_rtb.fitness import check_fitness
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.locate import build
from diffusion_rtb.runs import GROWS, RunFolderError
from diffusion_rtb.training_state import attach_posterior
from diffusion_rtb.whole_file import write_json

__all__ = ["Comparison", "Plan", "plan", "run"]

SHEET = "comparison.json"

Clock = Literal["seconds", "cpu_seconds"]
"""Seconds on the wall, or of this process on all cores, which say more where the machine is shared."""

FLOOR_SAMPLES = 100_000
"""Exact samples behind the floor of W2, which many runs are compared with."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is going to be run; everything about it was checked that can be without drawing a sample."""

    config: RunConfig
    """What every run starts from."""
    folder: Path
    cells: Sequence[Cell]
    """Runs, without those of refused pairs."""
    refused: dict[tuple[str, str], str]
    """Objective and behaviour -> why they do not fit."""
    looks: Looks
    clock: Clock
    prior: Prior
    target: ExactTarget


@dataclass(eq=False)
class Comparison:
    """What was measured so far."""

    plan: Plan
    floor: Distance
    truth: list[Result] = field(default_factory=list)
    """One for each seed."""
    results: dict[tuple[str, str], list[tuple[int, Result]]] = field(default_factory=dict)
    """Objective and behaviour -> seed and result of each of its runs that is finished."""

    @property
    def complete(self) -> bool:
        return sum(map(len, self.results.values())) == len(self.plan.cells)


def plan(
    config: Path,
    objectives: Sequence[str],
    behaviours: Sequence[str],
    seeds: int,
    overrides: Sequence[str] = (),
    *,
    variants: Path | None = None,
    looks: Looks,
    clock: Clock = "seconds",
) -> Plan:
    """Check everything that can be checked before anything is drawn or written.

    Raises:
        ValueError: a package is missing, a name is unknown, a config is impossible, the prior has no exact target for the
            reward, or no pair fits.
    """
    check_transport()
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The figure needs matplotlib, which is not installed: pip install matplotlib.")
    grid = cells(config, load_variants(config, variants), objectives, behaviours, seeds, overrides)
    for cell in grid:
        check_components(cell.config)
    base = load_config(config, overrides)
    prior: Prior = build(base.prior, "prior")
    attach_posterior(base, prior)
    target = exact_target(prior, base.reward.model_dump(), base.beta)
    refused: dict[tuple[str, str], str] = {}
    for cell in {cell.pair: cell for cell in grid}.values():
        try:
            _check_fit(cell.config, prior)
        except ValueError as error:
            refused[cell.pair] = str(error)
    fitting = [cell for cell in grid if cell.pair not in refused]
    if not fitting:
        raise ValueError("\n".join(["None of these objectives fits one of these behaviours.", *refused.values()]))
    return Plan(base, comparison_folder(base), fitting, refused, looks, clock, prior, target)


def _check_fit(config: RunConfig, prior: Prior) -> None:
    if config.behaviour.kl_budget is not None:
        raise ValueError(
            "behaviour.kl_budget changes beta and with it the target, which all runs of a comparison share."
        )
    check_fitness(config, build(config.objective, "objective"), prior)


def run(work: Plan, tell: Callable[[str], None], done: Callable[[Comparison], None]) -> Comparison:
    """Train and measure what is not finished yet; stops early where a signal came, see `Comparison.complete`.

    Args:
        work: The plan.
        tell: Told in one line what is going on.
        done: Called after each run, to write what is known.

    Raises:
        ValueError: the folder is that of another comparison, or holds a run of a variant that has changed; see `Trainer`.
    """
    prior, target, looks = work.prior, work.target, work.looks
    _open(work)
    for cell in work.cells:
        check_same(cell.config)
    reward: Any = build(work.config.reward, "reward")
    found = Comparison(work, _floor(work.folder, target, looks, tell))
    by_seed = {cell.config.seed: cell.config for cell in work.cells}
    for seed, one in by_seed.items():
        tell(f"truth, seed {seed}")
        found.truth.append(measure_truth(work.folder / "truth" / str(seed), prior, reward, target, one, looks))
    for number, cell in enumerate(work.cells, 1):
        where = f"{number}/{len(work.cells)}: {cell.objective}, {cell.behaviour}, seed {cell.config.seed}"
        result = finished(cell.config)
        tell(f"{where}{' is finished' if result else ''}")
        result = result or train_and_measure(cell.config, looks)
        if result is None:
            break
        found.results.setdefault(cell.pair, []).append((cell.config.seed, result))
        done(found)
    return found


def _floor(folder: Path, target: ExactTarget, looks: Looks, tell: Callable[[str], None]) -> Distance:
    path = folder / "floor.json"
    if not path.is_file():
        tell("W2 between exact samples")
        # Blocks of a size that the samplers fill as well.
        count = looks.samples if looks.samples < BLOCK else max(looks.samples, FLOOR_SAMPLES)
        write_json(path, asdict(floor(count, target.sample)))
    return Distance(**json.loads(path.read_text(encoding="utf-8")))


def _open(work: Plan) -> None:
    """Make the comparison's folder, or reopen it for the same config and the same way of measuring.

    Raises:
        RunFolderError: it is another comparison's, or something else.
    """
    folder, path = work.folder, work.folder / SHEET
    remedy = f"Choose another name (name=...), or delete {folder} to start afresh."
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        before, now = RunConfig.model_validate(held["config"]), work.config
        differing = {key: pair for key, pair in config_diff(before, now).items() if key not in GROWS}
        looks = asdict(work.looks)
        differing |= {key: (old, looks[key]) for key, old in held["looks"].items() if looks[key] != old}
        if differing:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items()]
            raise RunFolderError("\n".join([f"{folder} is a comparison of another config.", *lines, remedy]))
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists and is not a comparison's folder: it has no {SHEET}. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"config": work.config.model_dump(mode="json"), "looks": asdict(work.looks)})
