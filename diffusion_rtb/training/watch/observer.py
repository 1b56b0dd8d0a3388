"""The observer that looks at the posterior now and then, warns where the reward is being hacked, and keeps the best checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.watch.section import WatchConfig
from diffusion_rtb.files.pictures import save_png
from diffusion_rtb.run.best import read_best, write_best
from diffusion_rtb.run.folder import CHECKPOINTS
from diffusion_rtb.run.metrics_file import METRICS, read_rows
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import moving_rewards
from diffusion_rtb.training.observers import Observer
from diffusion_rtb.training.watch.change import Verdict, verdict
from diffusion_rtb.training.watch.look import Look, numbers, plan, take
from diffusion_rtb.training.watch.picture import pairs
from diffusion_rtb.training.watch.policy import better, candidate
from diffusion_rtb.training.watch.tools import Tools
from diffusion_rtb.training.watch.words import warning

__all__ = ["FOLDER", "Hands", "Watch"]

FOLDER = "watch"
"""Of the pictures, in the run's folder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hands:
    """What the observer does to the run."""

    final: Callable[[], AbstractContextManager[None]]
    """The block in which the posterior is what is handed out, see `Trainer.final`; nothing is saved in there."""

    beta: Callable[[], float]
    """beta as it is; nats per unit of reward."""
    save: Callable[[], None]
    """Write a checkpoint of where the run is."""
    between: Callable[[], object]
    """Called between micro-batches; raises where the run is to be left."""
    log: Callable[[int, dict[str, float]], None]
    """Write a row of metrics that no iteration writes."""
    show: Callable[[str, Path, int], None]
    """Given a picture's name, its file and the iteration."""


class Watch(Observer):
    """A look, at the posterior that would be handed out, before every n-th iteration and after the last. The numbers are in the row
    of the iteration that follows: with so many iterations behind it, which is also its checkpoint's number. At iteration 0 it is
    the prior, unless the run starts from another one's posterior.

    Args:
        config: The run, with a section `watch`.
        folder: The run's.
        sampler: Holds the models, the reward and the prompts.
        tools: Judges and embedder.
        hands: What it does to the run.
    """

    def __init__(self, config: RunConfig, folder: Path, sampler: Sampler, tools: Tools, hands: Hands) -> None:
        assert config.watch is not None
        self._watch: WatchConfig = config.watch
        self._folder = folder
        self._sampler = sampler
        self._tools = tools
        self._hands = hands
        self._from_prior = config.start is None
        self._rows, self._seeds = plan(config, config.watch)
        self._prior: Look | None = None
        self._seen: dict[str, float] = {}
        self._alarms: dict[int, bool] = {}

    def started(self, iteration: int) -> None:
        """Read which looks before this iteration raised the alarm."""
        rows, _ = read_rows(self._folder / METRICS)
        found = {number: row.get("watch/alarm") for number, row in rows.items() if number < iteration}
        self._alarms = {number: value == 1 for number, value in found.items() if value is not None}

    def before(self, iteration: int) -> None:
        """Look where it is time."""
        self._seen = self._look(iteration) if iteration % self._watch.every == 0 else {}

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """Add what was seen to the iteration's row."""
        metrics |= self._seen

    def finished(self, iterations: int) -> None:
        """Look at the posterior as it is in the end; a row of its own has that."""
        self._hands.log(iterations, self._look(iterations))

    def _look(self, iteration: int) -> dict[str, float]:
        """What goes into the metrics; the seconds are not those of an iteration."""
        with self._sampler.stopwatch.aside():
            if self._prior is None:
                self._prior = self._take(of_prior=True)
            elif moving_rewards(self._sampler.reward):
                self._prior = self._scored_anew(self._prior)
            posterior = self._prior if iteration == 0 and self._from_prior else self._take(of_prior=False)
            found = verdict(self._prior, posterior, self._watch.bands)
            seen = numbers(posterior, self._hands.beta())
            if found.wrong:
                self._warn(iteration, self._prior, posterior, found)
            elif iteration > 0:
                self._keep_if_best(iteration, found, seen["kl"])
        self._alarms[iteration] = bool(found.wrong)
        return {f"watch/{name}": value for name, value in seen.items()} | {"watch/alarm": float(bool(found.wrong))}

    def _take(self, *, of_prior: bool) -> Look:
        with self._hands.final():
            return take(
                self._sampler, self._tools, self._rows, self._seeds, of_prior=of_prior, between=self._hands.between
            )

    def _scored_anew(self, prior: Look) -> Look:
        """Of a reward whose answers move both sides are to have today's."""
        return prior.with_reward(self._sampler.rewards(prior.x_0, self._rows))

    def _keep_if_best(self, iteration: int, found: Verdict, kl: float) -> None:
        """Its checkpoint is on the disk before it is named, and the one before it is kept until then."""
        folder = self._folder / CHECKPOINTS
        new = candidate(iteration, self._watch, found, kl)
        if new is not None and better(new, read_best(folder), self._hands.beta()):
            if not (folder / new.name).is_dir():
                self._hands.save()
            write_best(folder, new)

    def _warn(self, iteration: int, prior: Look, posterior: Look, found: Verdict) -> None:
        picture = self._folder / FOLDER / f"{iteration:06d}.png"
        save_png(pairs(self._sampler, prior, posterior, found.wrong), picture)
        best = read_best(self._folder / CHECKPOINTS)
        log.warning("%s", warning(iteration, self._since(iteration), found, picture, best))
        self._hands.show("watch", picture, iteration)
        if self._watch.stop:
            self.stop = (
                f" by the alarm of iteration {iteration} (watch.stop). The same command goes on to the next look, with "
                "watch.stop=false to the end"
            )

    def _since(self, iteration: int) -> int:
        """The first of the looks that raised the alarm one after the other up to now."""
        since = iteration
        for number in sorted(self._alarms, reverse=True):
            if number < iteration:
                if not self._alarms[number]:
                    break
                since = number
        return since
