"""A sweep, planned: its points, each an ordinary run, the baseline beside them; what will not do is refused here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.run.checkpoint_reading import latest_state
from diffusion_rtb.run.folder import CHECKPOINTS, check_same, run_folder
from diffusion_rtb.sweep.axes import Axis, Point, configured, points, read_axes
from diffusion_rtb.training.assemble import check_run

__all__ = ["Plan", "plan"]

LOOKS, SMALLEST = 8, 3
"""Times that a baseline's diversity is looked at; samples of a prompt that a look needs."""


@dataclass(frozen=True)
class Plan:
    """What is going to be run."""

    config: RunConfig
    """What every point starts from."""
    folder: Path
    """Of the sweep's own files: OUT/NAME-sweep."""
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    configs: tuple[RunConfig, ...]
    """Of the points, as if each started from the prior."""
    baseline: RunConfig | None
    warm: int | None
    """Iterations of a point that starts from its neighbour; None: all start from the prior."""

    def settled(self, place: int, done: Sequence[int]) -> RunConfig:
        """The config of a point as it is run: a run that has begun keeps its start, another one takes its nearest neighbour.

        Args:
            place: Of the point.
            done: Places of the points that are trained.
        """
        config, before = self.configs[place], self.points[place].before
        folder = run_folder(config)
        begun = latest_state(folder / CHECKPOINTS)
        least = 0
        if begun is not None:
            start, least = begun[1]["config"].get("start"), int(begun[1]["iteration"])
        else:
            while before is not None and before not in done:
                before = self.points[before].before
            start = config.start if self.warm is None or before is None else str(run_folder(self.configs[before]))
        if start == config.start:
            return config
        train = config.train.model_copy(update={"iterations": max(least, self.warm or config.train.iterations)})
        return config.model_copy(update={"start": start, "train": train})


def plan(
    config: Path,
    arguments: Sequence[str],
    *,
    warm_start: bool | None = False,
    warm_iterations: int | None = None,
    baseline: str | None = "ddpo",
) -> Plan:
    """Check everything that can be checked before anything is drawn or written.

    Args:
        config: A YAML file.
        arguments: Axes `KEY=V1,V2,…` and overrides `KEY=VALUE`.
        warm_start: Each point starts from the posterior of the next smaller one; None: where an axis moves the target alone.
        warm_iterations: `train.iterations` of those that do; None: half of the config's.
        baseline: An objective without a beta, whose run beside the points is stopped early in effect; None: none.

    Raises:
        ConfigError: there is no axis, or a point's config is impossible.
        ValueError: a point, or the baseline, does not fit together; see `check_run`.
        RunFolderError: a point's folder holds another run.
    """
    axes, overrides = read_axes(arguments)
    base = load_config(config, overrides)
    found = points(axes)
    warm_start = any(point.before is not None for point in found) if warm_start is None else warm_start
    if warm_start and all(point.before is None for point in found):
        raise ConfigError(
            f"--warm-start goes along numbers of beta or reward.*, which move the target alone; this sweep is over "
            f"{', '.join(axis.key for axis in axes)}. Leave it out."
        )
    if warm_iterations is not None and (not warm_start or warm_iterations < 1):
        raise ConfigError(f"--warm-iterations {warm_iterations}: at least 1, and with --warm-start.")
    configs = [configured(config, point, overrides, base) for point in found]
    warm = (warm_iterations or -(-base.train.iterations // 2)) if warm_start else None
    work = Plan(base, Path(base.out, f"{base.name}-sweep"), tuple(axes), tuple(found), tuple(configs), None, warm)
    for place, one in enumerate(configs):
        check_run(one, run_folder(one))
        check_same(work.settled(place, []), run_folder(one), "Choose another name for the sweep (name=...)")
    return work if baseline is None else replace(work, baseline=_baseline(config, overrides, base, baseline))


def _baseline(config: Path, overrides: Sequence[str], base: RunConfig, objective: str) -> RunConfig:
    """The same config with another objective, on its own trajectories; every checkpoint is a point at which it can be stopped.

    Where diversity is evaluated, it is looked at along the training as well, on as many samples.
    """
    keep = base.train.iterations // base.train.checkpoint_every + 1
    own = [f"objective={json.dumps({'component': objective})}", "behaviours=[]", f"train.keep_checkpoints={keep}"]
    samples = min(base.eval.samples, base.eval.prior_samples)
    if base.watch is not None:
        own.append("watch.stop=false")
    elif base.eval.embedder is not None and samples >= SMALLEST:
        every, space = max(1, base.train.iterations // LOOKS), base.eval.embedder.model_dump()
        own.append(f"watch={json.dumps({'every': every, 'samples': samples, 'embedder': space})}")
    made = load_config(config, [*overrides, *own, f"name={json.dumps(f'{base.name}-{objective}')}"])
    try:
        check_run(made, run_folder(made))
        check_same(made, run_folder(made), "Choose another name for the sweep (name=...)")
    except ValueError as error:
        raise ValueError(f"The baseline {objective!r}: {error}\n--baseline none leaves it out.") from error
    return made
