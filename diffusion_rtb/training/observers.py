"""Who is told how a run goes: the files and trackers that its numbers go to, its sample sheets, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.files.pictures import grid, save_png
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["Checkpoints", "Observer", "Sheets"]

PROMPTS = 4
"""Rows on a sheet, at most."""


class Observer:
    """Told by `Trainer.fit` how the run goes; observers are told one after the other, in the order in which they are listed."""

    stop: str = ""
    """Why the run is to end before the next iteration, as an interruption ends it; empty: it goes on."""

    def started(self, iteration: int) -> None:
        """The run begins, or goes on; `iteration` comes next. Only then the objective warms up."""

    def waiting(self, announcement: str) -> None:
        """The objective warms up, which takes a while; a sentence that says with what."""

    def before(self, iteration: int) -> None:
        """This iteration is about to begin."""

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """This iteration is done; what an observer adds to `metrics` is seen by those after it."""

    def finished(self, iterations: int) -> None:
        """All iterations are done, now or in an earlier start."""

    def ended(self) -> None:
        """`fit` is being left, however it went."""


class Checkpoints(Observer):
    """Save now and then. It comes last: the row of an iteration is on the disk before the checkpoint that counts it.

    Args:
        save: Writes one.
        every: Iterations between two; 0: none.
    """

    def __init__(self, save: Callable[[], None], every: int) -> None:
        self._save = save
        self._every = every

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """Save where it is time."""
        if self._every and (iteration + 1) % self._every == 0:
            self._save()


class Sheets(Observer):
    """Draw now and then samples of the posterior that would be handed out, one row per prompt, always at the same noise.

    Args:
        sampler: Holds the posterior and the prompts.
        final: The block in which the posterior is what is handed out, see `Trainer.final`.
        run_seed: The run's seed.
        count: Samples per prompt.
        every: Iterations between two sheets; 0: none.
        folder: Where the PNG files go.
        show: Is given the name of the picture, its file and the iteration that comes next.
    """

    def __init__(
        self,
        sampler: Sampler,
        final: Callable[[], AbstractContextManager[None]],
        run_seed: int,
        *,
        count: int,
        every: int,
        folder: Path,
        show: Callable[[str, Path, int], None],
    ) -> None:
        self._sampler = sampler
        self._final = final
        self._seed = run_seed
        self._count = count
        self._every = every
        self._folder = folder
        self._show = show

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        """Write a sheet where it is time; its seconds are not those of an iteration."""
        done = iteration + 1
        if self._every and done % self._every == 0:
            path = self._folder / f"{done:06d}.png"
            self._write(path)
            self._show("samples", path, done)
            self._sampler.stopwatch.read()

    def _write(self, path: Path) -> None:
        sampler = self._sampler
        rows = range(min(PROMPTS, len(sampler.prompts)))
        pairs = numbered(rows, self._count)
        seeds = [seed_of(self._seed, "grid", *pair) for pair in pairs]
        with self._final():
            batch = sampler.draw([row for row, _ in pairs], seeds, images=True)
        assert batch.images is not None
        rewards = [f"{value:.2f}" for value in batch.reward.tolist()]
        save_png(grid(batch.images, self._count, captions=rewards, rows=sampler.texts(rows)), path)
