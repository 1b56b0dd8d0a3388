"""One sampler of a comparison: trained if it has to be, measured, and never twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.comparison.exact import ExactTarget
from diffusion_rtb.comparison.measure import draw_posterior, measured
from diffusion_rtb.comparison.trainer import CURVE, MeasuredTrainer, read_lines
from diffusion_rtb.config import RunConfig, config_diff, load_config
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.runs import GROWS, RunFolderError, run_folder
from diffusion_rtb.whole_file import whole, write_json

__all__ = ["PICTURED", "Looks", "Result", "check_same", "finished", "measure_truth", "train_and_measure"]

MEASURES, SAMPLES = "measures.json", "samples.safetensors"

PICTURED = 2000
"""Samples kept for the figure."""


@dataclass(frozen=True)
class Looks:
    """How a comparison measures."""

    samples: int = 40_000
    """Samples of each sampler, at the end."""
    points: int = 25
    """Looks at the posterior while it is trained."""
    point_samples: int = 4000
    """Samples of one such look."""


@dataclass(frozen=True, eq=False)
class Result:
    """A sampler that was measured."""

    numbers: Mapping[str, Any]
    """See `measured`; of a trained one also iterations, seconds and cpu_seconds."""
    curve: list[dict[str, Any]]
    """Looks while it was trained."""
    samples: Tensor
    """A few, for the figure; (kept, dim)."""


def check_same(config: RunConfig) -> None:
    """Refuse to take a run of another config, e.g. of a variant before it was changed, for this one.

    Raises:
        RunFolderError: the run's folder holds another config.
    """
    folder = run_folder(config)
    if not (folder / "config.yaml").is_file():
        return
    differing = {key: pair for key, pair in config_diff(load_config(folder), config).items() if key not in GROWS}
    if differing:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items()]
        remedy = f"Give the changed variant another name, or delete {folder} to run it afresh."
        raise RunFolderError("\n".join([f"{folder} already holds a run with another config.", *lines, remedy]))


def finished(config: RunConfig) -> Result | None:
    """The result of a run that was trained and measured to its last iteration, or None."""
    folder = run_folder(config)
    found = _read(folder)
    if found is None or found.get("iterations") != config.train.iterations:
        return None
    return Result(found, read_lines(folder / CURVE), load_file(folder / SAMPLES)["x"])


def train_and_measure(config: RunConfig, looks: Looks) -> Result | None:
    """Train a run to its end, from wherever it was left, and measure it; None where a signal ended it before.

    Raises:
        ValueError: see `MeasuredTrainer`; or its folder holds a run with another config.
    """
    trainer = MeasuredTrainer(config, points=looks.points, samples=looks.point_samples)
    trainer.fit()
    if trainer.interrupted:
        return None
    actor = trainer.actor
    x, drawn = draw_posterior(
        trainer.prior, actor.reward, actor.prompts, looks.samples, config.seed, metadata=actor.metadata
    )
    numbers = measured(x, drawn, trainer.target, config.beta) | {
        "iterations": trainer.iteration,
        "seconds": trainer.seconds,
        "cpu_seconds": trainer.cpu_seconds,
    }
    _write(trainer.folder, numbers, x)
    return finished(config)


def measure_truth(
    folder: Path, prior: Prior, reward: Reward, target: ExactTarget, config: RunConfig, looks: Looks
) -> Result:
    """The truth as a sampler: its exact denoiser through the same chain and number of steps, at the noise of this seed."""
    found = _read(folder)
    if found is None:
        table = config.prompts.table()
        x, drawn = draw_posterior(
            prior, reward, table.texts, looks.samples, config.seed, truth=target, metadata=table.metadata
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, measured(x, drawn, target, config.beta), x)
        found = _read(folder)
        assert found is not None
    return Result(found, [], load_file(folder / SAMPLES)["x"])


def _write(folder: Path, numbers: Mapping[str, Any], x: Tensor) -> None:
    """The samples first: where there are measures, everything is there."""
    with whole(folder / SAMPLES) as unfinished:
        save_file({"x": x[:PICTURED].float().contiguous()}, unfinished)
    write_json(folder / MEASURES, numbers)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / MEASURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
