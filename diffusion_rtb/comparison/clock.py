"""A clock that stops while the posterior is looked at, the looks, and the end of a budget.

What it counts is of warm-up and iterations: not of loading, of checkpoints or of measuring.
"""

from __future__ import annotations

from diffusion_rtb.comparison.cost import COSTS, TITLES, WATCHED, Budget, Meter
from diffusion_rtb.comparison.files import CURVE
from diffusion_rtb.comparison.truths.truth import Looks, Truth
from diffusion_rtb.run.metrics_file import METRICS, append_row, cut_rows, read_rows
from diffusion_rtb.training.observers import Observer
from diffusion_rtb.training.trainer import Trainer

__all__ = ["Clock"]


class Clock(Observer):
    """Count what a training costs, and now and then note in curve.jsonl how far its posterior is from the truth.

    It comes before the tracker, which writes the costs down, as training_seconds and so on.

    Args:
        trainer: Of the run, whose posterior is looked at as it would be handed out.
        truth: What it is held against.
        meter: Counts.
        looks: How often and how closely to look, evenly over the iterations.
        budget: After which the run ends; None: with its last iteration.
    """

    def __init__(
        self,
        trainer: Trainer,
        truth: Truth,
        meter: Meter,
        looks: Looks,
        budget: Budget | None = None,
    ) -> None:
        self._trainer, self._truth, self._folder = trainer, truth, trainer.folder
        self._meter, self._budget = meter, budget
        self._due = {round(k * trainer.config.train.iterations / looks.points) for k in range(looks.points)}
        self._samples = looks.point_samples

    @property
    def costs(self) -> dict[str, float]:
        """So far; `memory` in MiB."""
        return self._meter.spent | {"memory": self._meter.memory}

    def started(self, iteration: int) -> None:
        """Go on from the clock and the curve as they were at the checkpoint; the warm-up counts."""
        rows, _ = read_rows(self._folder / METRICS)
        for row in rows.values():
            if row["iteration"] < iteration:
                names = [*COSTS, "memory"]
                self._meter.resume({name: row[f"training_{name}"] for name in names if f"training_{name}" in row})
        cut_rows(self._folder / CURVE, iteration, whole=False)
        self._stop_if_spent()
        if iteration == 0:
            self._meter.go(memory=True)

    def before(self, iteration: int) -> None:
        """A look, where one is due."""
        self._meter.stop()
        if iteration in self._due:
            self._look(iteration)
        self._meter.go(memory=iteration < WATCHED)

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """The costs so far."""
        self._meter.stop()
        metrics |= {f"training_{name}": value for name, value in self.costs.items()}
        self._stop_if_spent()

    def ended(self) -> None:
        """Nothing is counted any more."""
        self._meter.stop()

    def _stop_if_spent(self) -> None:
        if self._budget is not None and self.costs.get(self._budget.cost, 0.0) >= self._budget.amount:
            self.stop = f"its budget of {self._budget.amount:g} {TITLES[self._budget.cost]} is spent"

    def _look(self, iteration: int) -> None:
        with self._trainer.final():
            point = self._truth.look(self._trainer.sampler, self._trainer.config, self._samples)
        append_row(self._folder / CURVE, iteration, self.costs | point)
