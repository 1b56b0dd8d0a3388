"""A posterior that is known: the truth of analytic priors, by exact samples and mode weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_rtb.comparison.files import held, write
from diffusion_rtb.comparison.truths.measure import draw_posterior, look, measured
from diffusion_rtb.comparison.truths.transport import BLOCK, Distance, check_transport, floor
from diffusion_rtb.comparison.truths.truth import Looks, Reference, Result, Truth
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget
from diffusion_rtb.files.whole import write_json
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["KnownTruth"]

FLOOR_SAMPLES = 100_000
"""Exact samples behind the floor of W2, which many runs are compared with."""


class KnownTruth(Truth):
    """See `Truth`.

    Args:
        target: The posterior.
        prior: With its posterior attached, whose place the exact denoiser takes.
        reward: Builds the reward.

    Raises:
        ValueError: a package that W2 needs is missing.
    """

    defaults = Looks()

    def __init__(self, target: ExactTarget, prior: Prior, reward: Callable[[], Reward]) -> None:
        check_transport()
        self.target = target
        self.floor: Distance | None = None
        self._prior, self._reward = prior, reward

    @property
    def log_z(self) -> float:
        """In closed form."""
        return self.target.log_z

    def prepare(self, folder: Path, looks: Looks, seeds: Mapping[int, RunConfig], tell: Callable[[str], None]) -> None:
        """The W2 of exact samples, and the exact denoiser through the same chain."""
        self.floor = self._floor(folder / "floor.json", looks, tell)
        runs = []
        for seed, config in seeds.items() if self.target.as_exact is not None else ():
            tell(f"truth, seed {seed}")
            runs.append((seed, self._through_the_chain(folder / "truth" / str(seed), config, looks)))
        self.references = [Reference("truth", "exact denoiser", runs)] if runs else ()

    def _floor(self, path: Path, looks: Looks, tell: Callable[[str], None]) -> Distance:
        try:
            return Distance(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet, or damaged
            tell("W2 between exact samples")
            # Blocks of a size that the samplers fill as well.
            count = looks.samples if looks.samples < BLOCK else max(looks.samples, FLOOR_SAMPLES)
            write_json(path, asdict(floor(count, self.target.sample)))
            return Distance(**json.loads(path.read_text(encoding="utf-8")))

    def _through_the_chain(self, folder: Path, config: RunConfig, looks: Looks) -> Result:
        """The truth as a sampler, through the same chain and number of steps, at the noise of this seed."""
        found = held(folder)
        if found is None:
            table = config.prompts.table()
            what = self._prior, self._reward(), table.texts, looks.samples, config.seed
            x, drawn = draw_posterior(*what, truth=self.target, metadata=table.metadata)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, measured(x, drawn, self.target, config.beta.value), x)
            found = held(folder)
            assert found is not None
        return found

    def look(self, sampler: Sampler, config: RunConfig, count: int) -> dict[str, float]:
        """A quarter of the samples with both log-densities."""
        what = sampler.prior, sampler.reward, sampler.prompts, count, config.seed
        x, drawn = draw_posterior(*what, scored=count // 4, metadata=sampler.metadata)
        return look(x, drawn, self.target, config.beta.value)

    def measured(self, sampler: Sampler, config: RunConfig, count: int) -> tuple[dict[str, Any], Tensor]:
        """See `measure.measured`."""
        what = sampler.prior, sampler.reward, sampler.prompts, count, config.seed
        x, drawn = draw_posterior(*what, metadata=sampler.metadata)
        return measured(x, drawn, self.target, config.beta.value), x

    def derived(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """W2 by that of exact samples."""
        assert self.floor is not None
        return {"w2_per_floor": numbers["w2"] / self.floor.mean}

    def sentences(self, looks: Looks) -> list[str]:
        """What the truth through the chain is, and the distances."""
        assert self.floor is not None
        error = "" if self.floor.standard_error is None else f" ± {self.floor.standard_error:.3f}"
        block = min(BLOCK, looks.samples)
        found = [
            f"{looks.samples:,} samples each; log Z = {self.log_z:.4f} nats.",
            "`truth` is the exact posterior's denoiser through the same chain and number of steps: its errors are not of learning."
            if self.target.as_exact is not None
            else "No denoiser is the exact posterior's, so the error of the chain is not known.",
            f"W2 is to {block:,} exact samples, mean over {looks.samples // block} such blocks; between exact samples it is "
            f"{self.floor.mean:.3f}{error} (floor).",
        ]
        if self.target.modes is not None:
            found.append(
                "TV is between sampled and true weights of modes; a sample within 4 standard deviations of a mode counts for it, "
                "the rest is off."
            )
        return found
