"""A whole comparison in one folder: checked first, then run seed by seed; the same command goes on where it was interrupted.

OUT/NAME-compare/
    comparison.json                     what it is a comparison of
    truth/SEED/, prior/                 the truth as a sampler; the samples of a prior whose posterior nobody knows
    runs/OBJECTIVE.BEHAVIOUR.SEED/      a run's folder each, with measures.json and curve.jsonl
    table.md, table.csv, runs.csv, figure.png
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusion_rtb.comparison.cell import DivergedError, finished, train_and_measure
from diffusion_rtb.comparison.cost import Budget, Cost
from diffusion_rtb.comparison.results import Comparison, Plan
from diffusion_rtb.comparison.truths.known import KnownTruth
from diffusion_rtb.comparison.truths.reweighted import ReweightedTruth
from diffusion_rtb.comparison.truths.truth import Truth
from diffusion_rtb.comparison.variants import cells, comparison_folder, load_variants
from diffusion_rtb.config.changes import changes
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.exact import HasExactTarget, exact_target
from diffusion_rtb.files.lock import LOCK, folder_lock
from diffusion_rtb.files.whole import clear_unfinished, write_json
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checks import Components, describe_components
from diffusion_rtb.run.folder import RunFolderError, check_same, run_folder
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.scoring.memory import stateful_rewards
from diffusion_rtb.training.assemble import check_run
from diffusion_rtb.training.chain_checks import check_chain

__all__ = ["held", "plan", "run", "truth_of"]

SHEET = "comparison.json"
WRITTEN = {LOCK, "prior", "truth", "floor.json", "runs", "table.md", "table.csv", "runs.csv", "figure.png"}
"""What may be there without it: where the sheet was lost, each run still has its own config."""


def plan(
    config: Path,
    objectives: Sequence[str],
    behaviours: Sequence[str],
    seeds: int,
    overrides: Sequence[str] = (),
    *,
    variants: Path | None = None,
    samples: int | None = None,
    points: int | None = None,
    point_samples: int | None = None,
    cost: Cost = "seconds",
    budget: Budget | None = None,
) -> Plan:
    """Check everything that can be checked before anything is drawn or written.

    Args:
        config: What every run starts from.
        objectives: Names, see `variants`.
        behaviours: Names.
        seeds: Runs of each pair.
        overrides: `key.sub=value` of every run.
        variants: File of further names.
        samples: See `Looks`; the truth's own number where it is None, as for the next two.
        points: Looks while training.
        point_samples: Of each.
        cost: What the figure's curves are against.
        budget: After which every run ends, if not with its last iteration.

    Raises:
        ValueError: a package is missing, a name is unknown, a config is impossible, the posterior is not known for the
            reward, or no pair fits.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The figure needs matplotlib, which is not installed: pip install matplotlib.")
    grid = cells(config, load_variants(config, variants), objectives, behaviours, seeds, overrides)
    for config_of_pair in {cell.pair: cell.config for cell in grid}.values():
        describe_components(config_of_pair)
    base = load_config(config, overrides)
    components = describe_components(base)
    prior: Prior = components.prior.build()
    refused: dict[tuple[str, str], str] = {}
    for cell in {cell.pair: cell for cell in grid}.values():
        try:
            _check_fit(cell.config, prior)
        except ValueError as error:
            refused[cell.pair] = str(error)
    fitting = [cell for cell in grid if cell.pair not in refused]
    if not fitting:
        raise ValueError("\n".join(["None of these objectives fits one of these behaviours.", *refused.values()]))
    truth = truth_of(base, components, prior)
    asked = {"samples": samples, "points": points, "point_samples": point_samples}
    looks = replace(truth.defaults, **{name: value for name, value in asked.items() if value is not None})
    return Plan(base, comparison_folder(base), fitting, refused, looks, cost, truth, budget)


def truth_of(config: RunConfig, components: Components | None = None, prior: Prior | None = None) -> Truth:
    """What samplers of this config are held against: the posterior where it is known, else the prior's samples, re-weighted.

    Args:
        config: Of a run.
        components: Of the config, where they are described already.
        prior: Where it is loaded already.

    Raises:
        ValueError: the prior knows its posterior, but not for this reward; or the reward learns, and no two runs have the same.
    """
    components = components or describe_components(config)
    model: Prior = components.prior.build() if prior is None else prior
    if not isinstance(model, HasExactTarget):
        learning = [type(part).__name__ for part in stateful_rewards(components.reward.construct()).values()]
        if learning:
            raise ValueError(
                f"{' and '.join(learning)} learns from what it sees: each run would have a reward of its own, and none could be "
                "held against the re-weighted prior. Compare with a reward that stays the same."
            )
        return ReweightedTruth(config, components, model)
    attach_posterior(config, model)
    target = exact_target(model, components.reward.construct(), config.beta.value)
    return KnownTruth(target, model, components.reward.build)


def _check_fit(config: RunConfig, prior: Prior) -> None:
    """What a run of its own refuses, before anything of any run is drawn."""
    if config.beta.kl_budget is not None:
        raise ValueError("beta.kl_budget changes beta and with it the target, which all runs of a comparison share.")
    components, mixture = check_run(config, run_folder(config))
    check_chain(config, components.objective.construct(), prior, mixture)


def run(work: Plan, tell: Callable[[str], None], done: Callable[[Comparison], None]) -> Comparison:
    """Train and measure what is not finished yet; stops early where a signal came, see `Comparison.complete`.

    A run that diverges is told of and left out, the others go on.

    Args:
        work: The plan.
        tell: Told in one line what is going on.
        done: Called after each run, to write what is known.

    Raises:
        ValueError: the folder is that of another comparison, or holds a run of a variant that has changed; see `Trainer`.
    """
    with held(work):
        for cell in work.cells:
            check_same(cell.config, run_folder(cell.config), "Give the changed variant another name")
        by_seed = {cell.config.seed: cell.config for cell in work.cells}
        work.truth.prepare(work.folder, work.looks, by_seed, tell)
        found = Comparison(work)
        for number, cell in enumerate(work.cells, 1):
            where = f"{number}/{len(work.cells)}: {cell.objective}, {cell.behaviour}, seed {cell.config.seed}"
            result = finished(cell.config, work.budget)
            tell(f"{where}{' is finished' if result else ''}")
            try:
                result = result or train_and_measure(cell.config, work.truth, work.looks, work.budget)
            except DivergedError as error:
                found.diverged[*cell.pair, cell.config.seed] = str(error)
                tell(f"{where}: {error}")
                continue
            if result is None:
                break
            found.results.setdefault(cell.pair, []).append((cell.config.seed, result))
            done(found)
        return found


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
        write_json(path, {"config": work.config.model_dump(mode="json"), "looks": _measuring(work)})
        yield


def _measuring(work: Plan) -> dict[str, Any]:
    """How it measures, as plain JSON values."""
    return asdict(work.looks) | ({} if work.budget is None else {"budget": asdict(work.budget)})


def _check_sheet(work: Plan, path: Path) -> None:
    folder = work.folder
    remedy = f"Choose another name (name=...), or delete {folder} to start afresh."
    if not path.is_file():
        if folder.exists() and (folder.is_file() or any(file.name not in WRITTEN for file in folder.iterdir())):
            raise RunFolderError(f"{folder} exists and is not a comparison's folder: it has no {SHEET}. {remedy}")
        return
    try:
        sheet = json.loads(path.read_text(encoding="utf-8"))
        before, looks = RunConfig.model_validate(sheet["config"]), dict(sheet["looks"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}). Delete it: the runs beside it are checked one by one."
        ) from None
    now = _measuring(work)
    lines = changes(before, work.config)
    keys = [key for key in dict.fromkeys([*looks, *now]) if now.get(key) != looks.get(key)]
    lines += [f"  {key}: {looks.get(key)!r} there, {now.get(key)!r} now" for key in keys]
    if lines:
        raise RunFolderError("\n".join([f"{folder} is a comparison of another config.", *lines, remedy]))
