"""One iteration, in five hops: draw trajectories, complete their densities, objective, backward inside the steps, update.

    behaviours -> Batch -> objective -> cotangent dL/dlog_q -> replay_backward -> optimizer

The objective sees only small tensors. Its gradient with respect to log_q (batch, steps) is pushed through the network one step
at a time, so the exact full-trajectory gradient needs the activation memory of one network call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.behaviours.mixture import draw, settle, sources
from diffusion_rtb.behaviours.on_policy import OnPolicy
from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.beta import make_beta
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.interfaces import Loss, Objective, Terms
from diffusion_rtb.run.checkpoint_reading import Checkpoint
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import observing, reward_tensors
from diffusion_rtb.training.compatibility import check_owner
from diffusion_rtb.training.gradient import average_gradients, check_trainable, clip_gradients, push_back, some_steps
from diffusion_rtb.training.metrics import Measured, batch_metrics, check_parity, parity, posterior_metrics, realised
from diffusion_rtb.training.observers import Checkpoints, Observer
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.rounding_floor import first_floor
from diffusion_rtb.training.schedules import learning_rate_factor, prompt_rows
from diffusion_rtb.training.state import load_snapshot, restore_training, save_training, snapshot
from diffusion_rtb.training.stop_signal import Stopped, StopSignal
from diffusion_rtb.training.warm_up import learn_statistics, warm_up

__all__ = ["Trainer"]

ADAM_EPS = 1e-15
"""Next to nothing: a gradient of 1e-9 is as good as one of 1, and an objective may come in any unit."""

ECHO = 2.0
"""Seconds within which a launcher passes on the signal that the terminal gave its processes already."""


class Trainer:
    """Fine-tune the posterior of one run; resumes from the run folder's latest checkpoint.

    Args:
        config: The run.
        folder: Where its metrics, checkpoints and sample grids go.
        sampler: Prior and reward on the run's prompts, loaded; the prior's adapters are attached here.
        objective: Loss on trajectories.
        processes: Those that train together.
        observers: Told how it goes, in this order; the checkpoints come after them.
        begun: Where the run goes on from, if that was read already.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        sampler: Sampler,
        objective: Objective,
        processes: Processes,
        observers: Sequence[Observer] = (),
        begun: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.sampler = sampler
        self.prior = prior = sampler.prior
        self.objective = objective
        self.processes = processes
        self.begun = begun
        self.observers: list[Observer] = [*observers, Checkpoints(self.save, config.train.checkpoint_every)]
        self.sources = sources(config)
        on_policy, _ = self.sources["posterior"]
        assert isinstance(on_policy, OnPolicy)
        self.on_policy = on_policy
        self.target = make_beta(config.beta)
        attach_posterior(config, prior)
        check_trainable(prior.parameters())
        torch.manual_seed(seed_of(config.seed, "objective"))
        objective.prepare(len(sampler.prompts), prior.dims, prior.features(sampler.prompts[:1]).shape[1])
        if isinstance(objective, torch.nn.Module):
            objective.to(prior.device)
        self.uses_kl = bool(getattr(objective, "uses_kl", False))
        self.optimizer = self._optimizer()
        learns = len(self.optimizer.param_groups) > 1
        check_owner(objective, learns, processes.count)
        self.iteration = 0
        self.warmed = False
        self._stop = StopSignal(together=ECHO if processes.count > 1 else 0.0)
        self._left = False

    def _optimizer(self) -> torch.optim.AdamW:
        train = self.config.train
        groups = [{"params": list(self.prior.parameters().values()), "lr": train.lr}]
        own = self.objective.parameters() if isinstance(self.objective, torch.nn.Module) else ()
        owned = [parameter for parameter in own if parameter.requires_grad]
        if owned:
            groups.append({"params": owned, "lr": train.lr_objective})
        self._rates = [train.lr, train.lr_objective][: len(groups)]
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=(train.adam_beta1, train.adam_beta2), eps=ADAM_EPS)

    # The loop

    def fit(self) -> None:
        """Train to the configured number of iterations, from wherever the latest checkpoint left off."""
        with self.processes.guarded(), folder_lock(self.folder, self.processes.main):
            with self._stop, ExitStack() as end, suppress(Stopped):
                for observer in self.observers:
                    end.callback(observer.ended)
                self.resume()
                for observer in self.observers:
                    observer.started(self.iteration)
                self._begin()
                while self.iteration < self.config.train.iterations:
                    self._leave_if_asked()
                    with self._all_or_nothing():
                        for observer in self.observers:
                            observer.before(self.iteration)
                        metrics = self.step()
                    self.iteration += 1
                    for observer in self.observers:
                        observer.after(self.iteration - 1, metrics)
            self.save()
            self.processes.agree()  # nobody leaves while the checkpoint may still fail

    def _begin(self) -> None:
        """What comes before the first iteration: the reward's statistics and the objective's V."""
        if self.iteration > 0 or self.warmed:
            return
        with self._all_or_nothing():
            learn_statistics(self.sampler, self.config.seed, self.processes, self._leave_if_asked)
        buffer, count = self._prior_buffer()
        with self._all_or_nothing(), self._leaving_buffer():
            self.warmed = warm_up(self.objective, self.sampler, buffer, count > 0, self.beta, self._leave_if_asked)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where the block fails or is left, everything is as it was before it, and that is what is saved after a failure."""
        before = snapshot(self)
        try:
            yield
        except (Exception, Stopped) as error:
            load_snapshot(self, before)
            if not isinstance(error, Stopped):
                self.save()
            raise

    def _leave_if_asked(self) -> None:
        """Give up what is not finished when any process was sent a signal; all processes call it at the same places."""
        if self.processes.agree(self._stop.came):
            self._left = True
            raise Stopped

    @contextmanager
    def _leaving_buffer(self, *, alone: bool = False) -> Iterator[None]:
        """Filling the prior's buffer takes longer than an iteration: it is left in the middle.

        With `alone` only by a single process: of several, some may have nothing to fill, and could not agree.
        """
        buffer, _ = self._prior_buffer()
        buffer.between = (lambda: None) if alone and self.processes.count > 1 else self._leave_if_asked
        try:
            yield
        finally:
            buffer.between = lambda: None

    def _prior_buffer(self) -> tuple[PriorBuffer, int]:
        buffer, count = self.sources["prior"]
        assert isinstance(buffer, PriorBuffer)
        return buffer, count

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics."""
        beta, seconds = self.beta, self.sampler.stopwatch
        rows = self.processes.share(self._rows())
        explored = self.on_policy.noise_scale(self.iteration) is not None
        own = self.on_policy.own(self.sampler, rows, self.iteration) if explored else None
        own = None if own is None else self.sampler.completed(own)
        with observing(self.sampler.reward, self._gather_row), self._leaving_buffer(alone=True):
            parts = draw(self.sources, self.sampler, rows, self.iteration, beta)
        drawn = parts["posterior"] if own is None else own
        floor = {} if self.iteration > 0 else first_floor(self.sampler, drawn, self.config, self.processes)
        metrics: dict[str, float] = {}
        for update in range(self.config.train.updates_per_iteration):
            if update > 0:  # the posterior has moved
                parts = {name: replace(part, log_q=None, kl=None) for name, part in parts.items()}
            complete = self.sampler.with_kl if self.uses_kl else self.sampler.completed
            parts = {name: complete(part) for name, part in parts.items()}
            loss, replayed, norm = self._update(list(parts.values()), beta, update)
            if update == 0:
                own = own if explored else parts["posterior"]
                metrics = batch_metrics(parts, loss, replayed, self.processes) | {"beta": beta, "gradient_norm": norm}
        if own is not None:
            metrics |= self._measure(own, beta)
        settle(self.sources, parts)
        return metrics | floor | {f"seconds/{phase}": spent for phase, spent in seconds.read().items()}

    def _measure(self, own: Batch, beta: float) -> dict[str, float]:
        """What the posterior's own trajectories say of it, and where beta goes from there."""
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

    def _update(
        self, parts: list[Batch], beta: float, update: int
    ) -> tuple[Loss, list[Float[Tensor, "_ steps"]], float]:
        """Objective, backward inside the steps, clip, optimizer; returns the loss, replayed log_q and gradient norm."""
        train = self.config.train
        whole = Batch.cat(parts)
        terms = self._terms(whole)
        self.optimizer.zero_grad()
        with self.sampler.stopwatch("objective"):
            loss = self.objective(terms, beta)
            (loss.loss * loss.to_nats).backward()
        assert terms.log_q.grad is not None
        with self.sampler.stopwatch("backward"):
            kl_cotangent = None if terms.kl is None else terms.kl.grad
            seed = seed_of(self.config.seed, "steps", self.iteration, update)
            steps = some_steps(parts[0], train.gradient_steps, seed)
            replayed = push_back(
                self.sampler, parts, terms.log_q.grad, kl_cotangent, weights=train.step_weights, steps=steps
            )
        if update == 0:  # before the step: a rejected gradient must not reach the parameters
            assert parts[0].log_q is not None
            check_parity(parity(parts[0].log_q, replayed[0]), train.parity_tolerance, self.iteration)
        average_gradients([p for group in self.optimizer.param_groups for p in group["params"]], self.processes)
        norm = clip_gradients(self.prior.parameters().values(), train.grad_clip, self.iteration)
        factor = learning_rate_factor(train, self.iteration)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return loss, replayed, norm

    def _terms(self, batch: Batch) -> Terms:
        assert batch.log_q is not None
        assert batch.log_p is not None
        trajectory = batch.trajectory
        return Terms(
            log_q=batch.log_q.detach().clone().requires_grad_(),
            log_p=batch.log_p.detach(),
            reward=batch.reward.to(batch.log_q),
            prompt=batch.prompt,
            x=trajectory.x,
            timesteps=trajectory.timesteps,
            features=self.prior.features(self.sampler.texts(batch.prompt)),
            log_behaviour=trajectory.drawn_with,
            kl=None if batch.kl is None else batch.kl.detach().clone().requires_grad_(),
        )

    # State

    def save(self) -> None:
        """Write a checkpoint that `resume` continues from number for number, once there is anything to continue."""
        begun = self.iteration > 0 or self.warmed or bool(reward_tensors(self.sampler.reward))
        if begun and self.processes.main:  # a run without a checkpoint leaves its name free
            save_training(self)

    def resume(self) -> None:
        """Continue from the latest checkpoint of the run folder, if there is one."""
        restore_training(self)

    @property
    def interrupted(self) -> bool:
        """A signal ended `fit` before the last iteration."""
        return (self._stop.came or self._left) and self.iteration < self.config.train.iterations
