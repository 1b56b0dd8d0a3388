"""A clock that stops while the posterior is looked at, and the looks.

`training seconds` are those of warm-up and iterations: not of loading, of checkpoints or of measuring.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from diffusion_rtb.comparison.measure import draw_posterior, look
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget
from diffusion_rtb.run.metrics_file import METRICS, append_row, cut_rows, read_rows
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.observers import Observer

__all__ = ["CURVE", "Clock", "read_lines"]

CURVE = "curve.jsonl"


class Clock(Observer):
    """Time a training, and now and then note in curve.jsonl how far its posterior is from the truth.

    It comes before the tracker, which writes the seconds down.

    Args:
        sampler: Holds the posterior that is trained.
        target: The truth.
        config: The run.
        folder: The run's.
        points: Looks at the posterior, evenly over the iterations; 0: none.
        samples: Samples of one look.
    """

    def __init__(
        self, sampler: Sampler, target: ExactTarget, config: RunConfig, folder: Path, *, points: int, samples: int
    ) -> None:
        self.seconds = 0.0
        """Training seconds so far, on the wall."""
        self.cpu_seconds = 0.0
        """The same of this process on all cores."""
        self._sampler = sampler
        self.target = target
        self._config = config
        self._folder = folder
        iterations = config.train.iterations
        self._due = {round(k * iterations / points) for k in range(points)} if points else set()
        self._samples = samples
        self._since: tuple[float, float] | None = None

    def started(self, iteration: int) -> None:
        """Go on from the clock and the curve as they were at the checkpoint; the warm-up counts."""
        rows, _ = read_rows(self._folder / METRICS)
        for row in rows.values():
            if row["iteration"] < iteration:
                self.seconds = row.get("training_seconds", self.seconds)
                self.cpu_seconds = row.get("training_cpu_seconds", self.cpu_seconds)
        cut_rows(self._folder / CURVE, iteration, whole=False)
        if iteration == 0:
            self._go()

    def before(self, iteration: int) -> None:
        """A look, where one is due."""
        self._stop()
        if iteration in self._due:
            self._look(iteration)
        self._go()

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """The seconds so far."""
        self._stop()
        metrics |= {"training_seconds": self.seconds, "training_cpu_seconds": self.cpu_seconds}

    def _go(self) -> None:
        self._since = perf_counter(), process_time()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += perf_counter() - self._since[0]
            self.cpu_seconds += process_time() - self._since[1]
            self._since = None

    def _look(self, iteration: int) -> None:
        sampler, config = self._sampler, self._config
        x, drawn = draw_posterior(
            sampler.prior,
            sampler.reward,
            sampler.prompts,
            self._samples,
            config.seed,
            scored=self._samples // 4,
            metadata=sampler.metadata,
        )
        point = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        append_row(self._folder / CURVE, iteration, point | look(x, drawn, self.target, config.beta.value))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of looks; [] where there is none. A line that a kill cut off is left out."""
    rows, _ = read_rows(path)
    return [{name: value for name, value in row.items() if value is not None} for row in rows.values()]
