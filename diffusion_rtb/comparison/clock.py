"""The ordinary trainer with a clock that stops while the posterior is looked at.

`training seconds` are those of warm-up and iterations: not of loading, of checkpoints or of measuring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from diffusion_rtb.comparison.measure import draw_posterior, look
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget, exact_target
from diffusion_rtb.run.metrics_file import append_row, cut_rows, read_rows
from diffusion_rtb.training.assemble import parts
from diffusion_rtb.training.trainer import Trainer

__all__ = ["CURVE", "MeasuredTrainer", "read_lines"]

CURVE = "curve.jsonl"


class MeasuredTrainer(Trainer):
    """Train one run, and now and then note in curve.jsonl how far its posterior is from the truth.

    Args:
        config: The run.
        points: Looks at the posterior, evenly over the iterations; 0: none.
        samples: Samples of one look.

    Raises:
        ValueError: see `assemble`; or the prior has no exact target for the reward.
    """

    def __init__(self, config: RunConfig, *, points: int, samples: int) -> None:
        super().__init__(*parts(config))
        self.target: ExactTarget = exact_target(self.prior, config.reward.model_dump(), config.beta)
        self.seconds = 0.0
        """Training seconds so far, on the wall."""
        self.cpu_seconds = 0.0
        """The same of this process on all cores."""
        iterations = config.train.iterations
        self._due = {round(k * iterations / points) for k in range(points)} if points else set()
        self._samples = samples

    def step(self) -> dict[str, float]:
        """One iteration, timed; before it a look, where one is due."""
        if self.iteration in self._due:
            self._look()
        with self._clock():
            metrics = super().step()
        return metrics | {"training_seconds": self.seconds, "training_cpu_seconds": self.cpu_seconds}

    def _begin(self) -> None:
        with self._clock():
            super()._begin()

    def resume(self) -> None:
        """Continue from the latest checkpoint, with the clock and the curve as they were there."""
        super().resume()
        rows, _ = read_rows(self.tracker.path)
        for row in rows.values():
            self.seconds = row.get("training_seconds", self.seconds)
            self.cpu_seconds = row.get("training_cpu_seconds", self.cpu_seconds)
        cut_rows(self.folder / CURVE, self.iteration, whole=False)

    def _look(self) -> None:
        sampler, seed = self.sampler, self.config.seed
        scored, known = self._samples // 4, sampler.metadata
        x, drawn = draw_posterior(
            self.prior, sampler.reward, sampler.prompts, self._samples, seed, scored=scored, metadata=known
        )
        point = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        point |= look(x, drawn, self.target, self.config.beta)
        append_row(self.folder / CURVE, self.iteration, point)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        wall, cpu = perf_counter(), process_time()
        try:
            yield
        finally:
            self.seconds += perf_counter() - wall
            self.cpu_seconds += process_time() - cpu


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of looks; [] where there is none. A line that a kill cut off is left out."""
    rows, _ = read_rows(path)
    return [{name: value for name, value in row.items() if value is not None} for row in rows.values()]
