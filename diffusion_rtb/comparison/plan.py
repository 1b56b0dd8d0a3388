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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_rtb.behaviours._mixture import sources
from diffusion_rtb.comparison.cell import finished, measure_truth, train_and_measure
from diffusion_rtb.comparison.results import Clock, Comparison, Looks, Plan
from diffusion_rtb.comparison.transport import BLOCK, Distance, check_transport, floor
from diffusion_rtb.comparison.variants import cells, comparison_folder, load_variants
from diffusion_rtb.config.changes import changes
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.exact import ExactTarget, exact_target
from diffusion_rtb.files.lock import LOCK, folder_lock
from diffusion_rtb.files.whole import clear_unfinished, write_json
from diffusion_rtb.interfaces import Objective, Prior
from diffusion_rtb.run.checks import describe_components, describe_prior
from diffusion_rtb.run.folder import RunFolderError, check_same, run_folder
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.training.compatibility import check_chain, check_settings

__all__ = ["held", "plan", "run"]

SHEET = "comparison.json"


FLOOR_SAMPLES = 100_000
"""Exact samples behind the floor of W2, which many runs are compared with."""


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
    described = {cell.pair: describe_components(cell.config) for cell in grid}
    base = load_config(config, overrides)
    prior: Prior = describe_prior(base).build()
    attach_posterior(base, prior)
    target = exact_target(prior, describe(base.reward, "reward").construct(), base.beta.value)
    refused: dict[tuple[str, str], str] = {}
    for cell in {cell.pair: cell for cell in grid}.values():
        try:
            _check_fit(cell.config, described[cell.pair].objective.construct(), prior)
        except ValueError as error:
            refused[cell.pair] = str(error)
    fitting = [cell for cell in grid if cell.pair not in refused]
    if not fitting:
        raise ValueError("\n".join(["None of these objectives fits one of these behaviours.", *refused.values()]))
    return Plan(base, comparison_folder(base), fitting, refused, looks, clock, prior, target)


def _check_fit(config: RunConfig, objective: Objective, prior: Prior) -> None:
    if config.beta.kl_budget is not None:
        raise ValueError("beta.kl_budget changes beta and with it the target, which all runs of a comparison share.")
    check_settings(config, objective, sources(config))
    check_chain(config, objective, prior)


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
    with held(work):
        for cell in work.cells:
            check_same(cell.config, run_folder(cell.config), "Give the changed variant another name")
        reward: Any = build(work.config.reward, "reward")
        found = Comparison(work, _floor(work.folder, target, looks, tell))
        by_seed = {cell.config.seed: cell.config for cell in work.cells}
        for seed, one in by_seed.items() if target.as_exact is not None else ():
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
    try:
        return Distance(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
        tell("W2 between exact samples")
        # Blocks of a size that the samplers fill as well.
        count = looks.samples if looks.samples < BLOCK else max(looks.samples, FLOOR_SAMPLES)
        write_json(path, asdict(floor(count, target.sample)))
        return Distance(**json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def held(work: Plan) -> Iterator[None]:
    """Make the comparison's folder, or reopen it for the same config and way of measuring; nobody else writes there in the block.

    Raises:
        RunFolderError: it is another comparison's, or something else.
        FolderInUseError: another command writes there.
    """
    folder, path = work.folder, work.folder / SHEET
    _check_sheet(work, path)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        clear_unfinished(folder)
        write_json(path, {"config": work.config.model_dump(mode="json"), "looks": asdict(work.looks)})
        yield


def _check_sheet(work: Plan, path: Path) -> None:
    folder = work.folder
    remedy = f"Choose another name (name=...), or delete {folder} to start afresh."
    if not path.is_file():
        if folder.exists() and (folder.is_file() or any(file.name != LOCK for file in folder.iterdir())):
            raise RunFolderError(f"{folder} exists and is not a comparison's folder: it has no {SHEET}. {remedy}")
        return
    try:
        sheet = json.loads(path.read_text(encoding="utf-8"))
        before, looks = RunConfig.model_validate(sheet["config"]), dict(sheet["looks"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}). Delete it: the runs beside it are checked one by one."
        ) from None
    now = asdict(work.looks)
    lines = changes(before, work.config)
    lines += [f"  {key}: {old!r} there, {now.get(key)!r} now" for key, old in looks.items() if now.get(key) != old]
    if lines:
        raise RunFolderError("\n".join([f"{folder} is a comparison of another config.", *lines, remedy]))
