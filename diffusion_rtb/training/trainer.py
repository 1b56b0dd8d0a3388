"""The loop of a run: iterations that succeed or leave everything as it was, and observers that are told of them.

sources -> Batch -> `Updates.gradient` -> `descend`
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diffusion_rtb.beta import Beta
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.interfaces import Objective
from diffusion_rtb.out_of_memory import remedied
from diffusion_rtb.reach import Doubts
from diffusion_rtb.run.checkpoint_reading import AVERAGE, Checkpoint, read_latest
from diffusion_rtb.run.folder import CHECKPOINTS
from diffusion_rtb.run.memories import Memories
from diffusion_rtb.run.progress import Progress, trained_beta
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import observing, reward_tensors
from diffusion_rtb.training.copies import Copy, averaged
from diffusion_rtb.training.metrics import Measured, posterior_metrics, realised, reward_metrics, update_metrics
from diffusion_rtb.training.observers import Checkpoints, Observer
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.rounding_floor import first_floor
from diffusion_rtb.training.schedules import learning_rate_factor, prompt_rows
from diffusion_rtb.training.state import (
    Facts,
    Part,
    State,
    load,
    load_training,
    parts_of,
    save_training,
    snapshot,
    tensors_alone,
)
from diffusion_rtb.training.stop_signal import Stopped, StopSignal
from diffusion_rtb.training.updates.gradient import descend
from diffusion_rtb.training.updates.optimizer import adam
from diffusion_rtb.training.warm_up import learn_statistics, warm_up

__all__ = ["Trainer"]

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture
    from diffusion_rtb.training.updates.update import Updates

log = logging.getLogger(__name__)

ECHO = 2.0
"""Seconds within which a launcher passes on the signal that the terminal gave its processes already."""


class Trainer:
    """Fine-tune the posterior of one run; resumes from the run folder's latest checkpoint.

    Args:
        config: The run.
        folder: Where its metrics, checkpoints and sample grids go.
        sampler: Posterior, prior and reward on the run's prompts.
        objective: Loss on trajectories, prepared for the run.
        sources: Where trajectories come from.
        target: beta of each iteration.
        processes: Those that train together.
        updates: How the objective's gradient gets into the posterior.
        observers: Told how it goes, in this order; the checkpoints come after them.
        begun: Where the run goes on from, if that was read already.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        sampler: Sampler,
        objective: Objective,
        sources: Mixture,
        target: Beta,
        processes: Processes,
        updates: Updates,
        observers: Sequence[Observer] = (),
        begun: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.sampler = sampler
        self.prior = sampler.prior
        self.objective = objective
        self.sources = sources
        self.processes = processes
        self.begun = begun
        self.observers: list[Observer] = [*observers, Checkpoints(self.save, config.train.checkpoint_every)]
        self.target = target
        self.updates = updates
        self.optimizer = adam(self.prior.parameters().values(), objective, config.train)
        beta = Part(lambda: State({}, self.beta), lambda state: target.load(float(state.values)))
        self.parts = parts_of(sampler, objective, self.optimizer) | {"beta": beta}
        if (old := updates.old) is not None:
            self.parts["old"] = tensors_alone(lambda: old.held, old.load)
        if (choice := updates.choice) is not None:
            self.parts["steps"] = tensors_alone(choice.tensors, choice.load)
        self.average = average = None if config.train.ema is None else Copy(self.prior)
        if average is not None:
            self.parts[AVERAGE] = tensors_alone(lambda: average.held, average.load)
        self.memories = {
            f"source-{name}": tensors_alone(source.tensors, source.load) for name, (source, _) in sources.items()
        }
        self.on_disk: Memories = {}
        self.doubts = Doubts(sampler.prompts, config.beta)
        self.iteration = 0
        self.warmed = False
        self._stop = StopSignal(together=ECHO if processes.count > 1 else 0.0)
        self._left = False

    # The loop

    def fit(self) -> None:
        """Train to the configured number of iterations, from wherever the latest checkpoint left off."""
        memory = remedied(self.config, "train", kept=self._kept)
        with self.processes.guarded(), folder_lock(self.folder, self.processes.main), memory:
            with self._stop, ExitStack() as end, suppress(Stopped):
                for observer in self.observers:
                    end.callback(observer.ended)
                self.resume()
                for observer in self.observers:
                    observer.started(self.iteration)
                self._begin()
                while self.iteration < self.config.train.iterations:
                    self._leave_if_asked(any(observer.stop for observer in self.observers))
                    with self._all_or_nothing():
                        for observer in self.observers:
                            observer.before(self.iteration)
                        metrics = self.step()
                    self.iteration += 1
                    for observer in self.observers:
                        observer.after(self.iteration - 1, metrics)
                with self._all_or_nothing():
                    for observer in self.observers:
                        observer.finished(self.iteration)
            self.save()
            self.processes.agree()  # nobody leaves while the checkpoint may still fail

    def _begin(self) -> None:
        """What comes before the first iteration: the reward's statistics and the objective's V."""
        if self.iteration > 0 or self.warmed:
            return
        with self._all_or_nothing():
            learn_statistics(self.sampler, self.config.seed, self.processes, self._leave_if_asked)
        buffer, count = self.sources.prior
        with self._all_or_nothing(), self._leaving_buffer():
            between, look = self._leave_if_asked, self.doubts.look
            self.warmed = warm_up(self.objective, self.sampler, buffer, count > 0, self.beta, between, look, self._tell)

    def _tell(self, announcement: str) -> None:
        for observer in self.observers:
            observer.waiting(announcement)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where the block fails or is left, everything is as it was before it, and that is what is saved after a failure.

        Memories of behaviours are not put back: they change in `settle`, after all that can fail.
        """
        before = snapshot(self.parts)
        try:
            yield
        except (Exception, Stopped) as error:
            load(self.parts, before)
            if not isinstance(error, Stopped):
                self.save()
            raise

    def _kept(self) -> str:
        return f"Iterations done, {self.iteration}, are kept: the same command with such a setting goes on from there."

    def _leave_if_asked(self, wish: bool = False) -> None:
        """Give up what is not finished when any process was sent a signal or wishes it; all call it at the same places."""
        if self.processes.agree(self._stop.came or wish):
            self._left = True
            raise Stopped

    @contextmanager
    def _leaving_buffer(self, *, alone: bool = False) -> Iterator[None]:
        """Filling the prior's buffer takes longer than an iteration: it is left in the middle.

        With `alone` only by a single process: of several, some may have nothing to fill, and could not agree.
        """
        buffer, _ = self.sources.prior
        buffer.between = (lambda: None) if alone and self.processes.count > 1 else self._leave_if_asked
        try:
            yield
        finally:
            buffer.between = lambda: None

    def step(self) -> dict[str, float]:
        """One iteration: draw, then complete, loss, backward and update as often as configured; returns its metrics."""
        beta, rows = self.beta, self.processes.share(self._rows())
        own = self._undisturbed(rows)
        with observing(self.sampler.reward, self._gather_row), self._leaving_buffer(alone=True), self.updates.drawing():
            parts = self.sources.draw(self.sampler, rows, self.iteration, beta)
        if self.iteration == 0:
            undisturbed = own if self._aside else parts["posterior"]
            self.doubts.look(*self.sources.of_prior(undisturbed, self.config.start))
        floor = self._floor(parts["posterior"] if own is None else own)
        for update in range(self.config.train.updates_per_iteration):
            aside = own if self.updates.draws_old else None
            done = self.updates.gradient(parts, beta, self.iteration, update, aside)
            parts = done.parts
            norm = descend(self.optimizer, self.config.train, self.iteration, self.processes)
            if update == 0:
                metrics = {"beta": beta, "gradient_norm": norm}
                metrics |= update_metrics(done.shown, done.loss, done.value, done.replayed, self.processes)
                metrics |= self._measure(own if self._aside else parts["posterior"], beta)
        self.sources.settle(parts)
        self.updates.settle(self.iteration)
        if (choice := self.updates.choice) is not None:
            choice.settle(self.processes.mean)
        if self.average is not None and self.config.train.ema is not None:
            self.average.move(averaged(self.config.train.ema, self.iteration))
        seconds = self.sampler.stopwatch.read()
        return metrics | floor | {f"seconds/{phase}": spent for phase, spent in seconds.items()}

    @property
    def _aside(self) -> bool:
        """What the iteration learns from does not say how the posterior is: it was drawn wider, or by an older one."""
        return self.updates.draws_old or self.sources.on_policy.noise_scale(self.iteration) is not None

    def _undisturbed(self, rows: list[int]) -> Batch | None:
        """Trajectories to look at and not to learn from, where those learned from are others; None where none are wanted."""
        wanted = self._aside and self.updates.measures(self.iteration)
        own = self.sources.on_policy.own(self.sampler, rows, self.iteration) if wanted else None
        return None if own is None else self.sampler.completed(own)

    def _floor(self, own: Batch) -> dict[str, float]:
        # It is measured while the posterior is the prior; one that starts from another run has that run's.
        begins = self.iteration == 0 and self.config.start is None and own.trajectory.has_density
        return {} if not begins else first_floor(self.sampler, own, self.config, self.processes)

    def _measure(self, own: Batch | None, beta: float) -> dict[str, float]:
        """What the posterior's own trajectories say of it, and where beta goes from there."""
        if own is None:
            return {}
        if own.log_q is None or own.log_p is None:
            return reward_metrics(*(x.cpu() for x in self.processes.gather(own.reward.double(), own.prompt)))
        measured = Measured.of(own).gathered(self.processes)
        pace = learning_rate_factor(self.config.train, self.iteration)
        return posterior_metrics(measured, beta) | self.target.settle(realised(measured), pace)

    def _gather_row(self, row: Tensor) -> Tensor:
        return self.processes.gather(row)[0]

    @property
    def beta(self) -> float:
        """beta of the current iteration; nats per unit of reward."""
        return self.target.now(self.iteration)

    def _rows(self) -> list[int]:
        """The prompts of the iteration, of all processes."""
        return prompt_rows(
            self.config.seed, self.iteration, self.config.train.prompts_per_iteration, len(self.sampler.prompts)
        )

    def final(self) -> AbstractContextManager[None]:
        """A block in which the posterior is what is looked at, evaluated and handed out: with `train.ema` the average."""
        return nullcontext() if self.average is None else self.average.worn()

    # State

    def save(self) -> None:
        """Write a checkpoint that `resume` continues from number for number, once there is anything to continue."""
        begun = self.iteration > 0 or self.warmed or bool(reward_tensors(self.sampler.reward))
        if begun and self.processes.main:  # a run without a checkpoint leaves its name free
            config = self.config.model_dump(mode="json")
            parts, keep = self.parts | self.memories, self.config.train.keep_checkpoints
            save_training(self.folder / CHECKPOINTS, self._facts(), parts, config, keep, self.on_disk)

    def resume(self) -> None:
        """Continue from the latest checkpoint of the run folder, if there is one.

        Raises:
            CheckpointError: it was written with another prior, sampler or adapter.
        """
        found, self.begun = read_latest(self.folder / CHECKPOINTS, self.begun), None
        if found is None:
            return
        self.on_disk = found.memories
        was = load_training(found, self._facts(), self.parts | self.memories)
        self.iteration, self.warmed = was.iteration, was.warmed
        if was.processes != self.processes.count and self.processes.main:
            log.warning(
                "The checkpoint at iteration %d was written by %d processes, this run has %d. They draw the same trajectories and "
                "add them up in another order: numbers agree up to rounding, not to the last digit.",
                was.iteration,
                was.processes,
                self.processes.count,
            )

    def _facts(self) -> Facts:
        return Facts(self.iteration, self.warmed, self.processes.count, self.prior.fingerprint())

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        beta = trained_beta(self.config, {"iteration": self.iteration, "beta": self.beta})
        return Progress(self.iteration, self.config.train.iterations, beta, ema=self.config.train.ema)

    def leave_alone(self) -> None:
        """`_leave_if_asked` for what a single process does: of several, the others are elsewhere and could not agree."""
        if self.processes.count == 1:
            self._leave_if_asked()

    @property
    def stopped(self) -> str:
        """Why an observer ended `fit` before the last iteration; empty: none did."""
        return next((observer.stop for observer in self.observers if observer.stop), "") if self.interrupted else ""

    @property
    def interrupted(self) -> bool:
        """A signal, or an observer, ended `fit` before the last iteration."""
        return (self._stop.came or self._left) and self.iteration < self.config.train.iterations
