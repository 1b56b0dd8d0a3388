"""The ordinary trainer with a clock that stops while the posterior is looked at.

`training seconds` are those of warm-up and iterations: not of loading, of checkpoints or of measuring.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from diffusion_rtb.assemble import parts
from diffusion_rtb.comparison.exact import ExactTarget, exact_target
from diffusion_rtb.comparison.measure import draw_posterior, look
from diffusion_rtb.config import RunConfig
from diffusion_rtb.trainer import Trainer

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

    def _warm_up(self) -> None:
        with self._clock():
            super()._warm_up()

    def resume(self) -> None:
        """Continue from the latest checkpoint, with the clock and the curve as they were there."""
        super().resume()
        held = read_lines(self.tracker.path)
        self.seconds = held[-1]["training_seconds"] if held else 0.0
        self.cpu_seconds = held[-1]["training_cpu_seconds"] if held else 0.0
        curve = [point for point in read_lines(self.folder / CURVE) if point["iteration"] < self.iteration]
        text = "".join(json.dumps(point) + "\n" for point in curve)
        (self.folder / CURVE).write_text(text, encoding="utf-8")

    def _look(self) -> None:
        actor, seed = self.actor, self.config.seed
        scored, known = self._samples // 4, actor.metadata
        x, drawn = draw_posterior(
            self.prior, actor.reward, actor.prompts, self._samples, seed, scored=scored, metadata=known
        )
        point = {"iteration": self.iteration, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        point |= look(x, drawn, self.target, self.config.beta)
        with (self.folder / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")

    @contextmanager
    def _clock(self) -> Iterator[None]:
        wall, cpu = perf_counter(), process_time()
        try:
            yield
        finally:
            self.seconds += perf_counter() - wall
            self.cpu_seconds += process_time() - cpu


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; [] where there is none. A line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
