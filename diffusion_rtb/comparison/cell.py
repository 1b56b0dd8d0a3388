"""One sampler of a comparison: trained if it has to be, measured, and never twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.comparison.clock import CURVE, Clock, read_lines
from diffusion_rtb.comparison.measure import draw_posterior, measured
from diffusion_rtb.comparison.results import PICTURED, Looks, Result
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget, exact_target
from diffusion_rtb.files.whole import whole, write_json
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.run.folder import run_folder
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer

__all__ = ["finished", "measure_truth", "timed", "train_and_measure"]

MEASURES, SAMPLES = "measures.json", "samples.safetensors"


def finished(config: RunConfig) -> Result | None:
    """The result of a run that was trained and measured to its last iteration, or None."""
    found = _held(run_folder(config))
    return found if found is not None and found.numbers.get("iterations") == config.train.iterations else None


def train_and_measure(config: RunConfig, looks: Looks) -> Result | None:
    """Train a run to its end, from wherever it was left, and measure it; None where a signal ended it before.

    Raises:
        ValueError: see `assemble`; or the prior has no exact target for the reward.
    """
    trainer, clock = timed(config, points=looks.points, samples=looks.point_samples)
    trainer.fit()
    if trainer.interrupted:
        return None
    sampler = trainer.sampler
    with trainer.final():
        x, drawn = draw_posterior(
            trainer.prior, sampler.reward, sampler.prompts, looks.samples, config.seed, metadata=sampler.metadata
        )
    numbers = measured(x, drawn, clock.target, config.beta.value) | {
        "iterations": trainer.iteration,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
    }
    _write(trainer.folder, numbers, x)
    return finished(config)


def timed(config: RunConfig, *, points: int, samples: int) -> tuple[Trainer, Clock]:
    """The trainer of a run, and the clock that it tells how it goes; see `Clock`."""
    trainer = assemble(config)
    target = exact_target(trainer.prior, trainer.sampler.reward, config.beta.value)
    clock = Clock(trainer.sampler, target, config, trainer.folder, points=points, samples=samples)
    trainer.observers.insert(0, clock)
    return trainer, clock


def measure_truth(
    folder: Path, prior: Prior, reward: Reward, target: ExactTarget, config: RunConfig, looks: Looks
) -> Result:
    """The truth as a sampler: its exact denoiser through the same chain and number of steps, at the noise of this seed."""
    found = _held(folder)
    if found is None:
        table = config.prompts.table()
        x, drawn = draw_posterior(
            prior, reward, table.texts, looks.samples, config.seed, truth=target, metadata=table.metadata
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, measured(x, drawn, target, config.beta.value), x)
        found = _held(folder)
        assert found is not None
    return found


def _write(folder: Path, numbers: Mapping[str, Any], x: Tensor) -> None:
    """The samples first: where there are measures, everything is there."""
    with whole(folder / SAMPLES) as unfinished:
        save_file({"x": x[:PICTURED].float().contiguous()}, unfinished)
    write_json(folder / MEASURES, numbers)


def _held(folder: Path) -> Result | None:
    """What was measured; None where there is nothing, or nothing readable any more: measured again, it is the same."""
    try:
        numbers = dict(json.loads((folder / MEASURES).read_text(encoding="utf-8")))
        samples = load_file(folder / SAMPLES)["x"]
    except (FileNotFoundError, ValueError, TypeError, SafetensorError, KeyError):
        return None
    return Result(numbers, read_lines(folder / CURVE), samples)
