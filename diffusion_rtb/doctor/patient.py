"""The run under examination: described, then loaded, then tried, each once and only when an examination asks for it.

What fails, fails for the examination that asked first; the others hear that it was not reached. Nothing is written anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import psutil
import torch

from diffusion_rtb.behaviours._mixture import Mixture, sources
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.doctor.dry_run import DryRun, Timed, dry_config, dry_run
from diffusion_rtb.interfaces import Objective, Prior
from diffusion_rtb.run.checks import Components
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered
from diffusion_rtb.scoring.memory import observing, wanting_rewards
from diffusion_rtb.training.assemble import check_run, load_sampler, prepare
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.schedules import prompt_rows

__all__ = ["Loaded", "NotReached", "Patient", "stage"]

T = TypeVar("T")


class NotReached(Exception):  # noqa: N818 — no error of this program: it says what an examination could not look at
    """An earlier stage failed, or was not begun for a reason that is the message."""


class stage(Generic[T]):  # noqa: N801 — a decorator
    """A property that is made once; where that fails, it is not tried again."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, patient: None, owner: type) -> stage[T]: ...

    @overload
    def __get__(self, patient: object, owner: type) -> T: ...

    def __get__(self, patient: object | None, owner: type) -> stage[T] | T:
        if patient is None:
            return self
        failed: set[str] = patient.__dict__.setdefault("_failed", set())
        if self.name in failed:
            raise NotReached("not reached: see above")
        try:
            found = self.make(patient)
        except NotReached:  # it has its reason with it, whoever asks
            raise
        except Exception:
            failed.add(self.name)
            raise
        patient.__dict__[self.name] = found  # read instead of this from now on
        return found


@dataclass(frozen=True, eq=False)
class Loaded:
    """The run's parts with their weights, as training has them before its first iteration."""

    sampler: Sampler
    """On the prompts of the dry iteration."""
    objective: Objective
    wanted: int
    """Samples of the prior that the reward wants to see before training."""
    before: int
    """Resident bytes of the process before anything was loaded."""

    @property
    def prior(self) -> Prior:
        """The prior, its posterior attached."""
        return self.sampler.prior


class Patient:
    """A run's config, and what becomes of it.

    Args:
        config: The run.
        folder: Where it would train, or has trained.
        processes: How many would train together, for the arithmetic; the doctor itself is one.

    Raises:
        ValueError: what `train` refuses before it loads anything.
    """

    def __init__(self, config: RunConfig, folder: Path, processes: int = 1) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            self.components, self.mixture = self._checked()
        self.warned = list(warned)
        """Warnings of the checks."""
        self.closed = ""
        """Why nothing is to be loaded; empty: it may be."""

    def _checked(self) -> tuple[Components, Mixture]:
        return check_run(self.config, self.folder)

    @property
    def objective(self) -> Objective:
        """As the config describes it, not prepared for its sizes unless the run is loaded."""
        found: Objective = self.components.objective.construct()
        return found

    @property
    def dry_config(self) -> RunConfig:
        """What the dry iterations are made of."""
        return dry_config(self.config, [count for _, count in self.mixture.values()])

    @stage
    def loaded(self) -> Loaded:
        """Prior, reward and objective with their weights, by the functions that training uses."""
        if self.closed:
            raise NotReached(f"not reached: {self.closed}")
        config, before = self.config, psutil.Process().memory_info().rss
        team = Processes.start(config.train.process_timeout)
        objective: Any = self.components.objective.build()
        whole = load_sampler(config, self.folder, self.components, objective, self.mixture)
        prepare(config, whole, objective, team)
        rows = prompt_rows(config.seed, 0, config.train.prompts_per_iteration, len(whole.prompts))
        rows = rows[: self.dry_config.train.prompts_per_iteration]
        sampler = Sampler(
            whole.prior,
            whole.reward,
            whole.texts(rows),
            config.train.micro_batch,
            [whole.metadata[row] for row in rows],
            needs_noise=whole.needs_noise,
        )
        wanted = max(wanting_rewards(sampler.reward).values(), default=0)
        return Loaded(sampler, objective, wanted, before)

    @stage
    def samples(self) -> Batch:
        """One micro-batch of the prior's trajectories with their images; a reward with a memory learns from them."""
        sampler = self.loaded.sampler
        count, prompts = self.config.train.micro_batch, len(sampler.prompts)
        pairs = numbered(range(prompts), -(-count // prompts))[:count]
        seeds = [seed_of(self.config.seed, "doctor", *pair) for pair in pairs]
        with observing(sampler.reward):
            return sampler.draw([row for row, _ in pairs], seeds, of_prior=True, images=True)

    @stage
    def dry(self) -> DryRun:
        """Two iterations as training would make them, of as few prompts as fill a micro-batch; then all is put back."""
        self.samples  # noqa: B018 — a reward learns its statistics from them
        config = self.dry_config
        mixture = sources(config)
        buffer, count = mixture.prior
        buffer.capacity = min(buffer.capacity, max(1, count, buffer.refresh))
        loaded, train = self.loaded, config.train
        return dry_run(
            config, self.folder, loaded.sampler, loaded.objective, mixture, Processes.start(train.process_timeout)
        )

    @stage
    def timed(self) -> Timed:
        """Seconds per trajectory of drawing, rewarding and scoring a micro-batch, once everything is warm."""
        self.dry  # noqa: B018 — warms everything up
        sampler, batch = self.loaded.sampler, self.samples
        seeds = [seed_of(self.config.seed, "doctor", "timed", k) for k in range(len(batch))]
        sampler.stopwatch.read()
        sampler.completed(sampler.draw(batch.prompt.tolist(), seeds, images=True))
        seconds = sampler.stopwatch.read()
        return Timed(*(seconds.get(phase, 0.0) / len(batch) for phase in ("rollout", "reward", "score")))

    @property
    def device(self) -> torch.device:
        """Where the prior's network is, once it is loaded."""
        return self.loaded.prior.device
