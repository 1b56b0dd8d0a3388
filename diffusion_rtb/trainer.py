"""One iteration, in five hops: draw trajectories, complete their densities, objective, backward inside the steps, update.

    behaviours -> Experience -> objective -> cotangent dL/dlog_q -> replay_backward -> optimizer

The objective sees only small tensors. Its gradient with respect to log_q (batch, steps) is pushed through the network one step
at a time, so the exact full-trajectory gradient needs the activation memory of one network call.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.actor import Actor, Experience
from diffusion_rtb.behaviours.anneal import annealed
from diffusion_rtb.behaviours.kl_budget import realised
from diffusion_rtb.behaviours.mixture import budget, draw, settle, share_rewards, sources
from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.config import RunConfig
from diffusion_rtb.fitness import check_fitness, check_processes
from diffusion_rtb.gradients import (
    average_gradients,
    check_parity,
    check_trainable,
    clip_gradients,
    push_back,
    some_steps,
)
from diffusion_rtb.interfaces import Loss, Objective, Prior, Reward, Terms
from diffusion_rtb.noising import noised
from diffusion_rtb.reward_state import observing
from diffusion_rtb.schedules import learning_rate_factor, nth_prompt
from diffusion_rtb.seeds import seed_of
from diffusion_rtb.sheets import write_sheet
from diffusion_rtb.stop_signal import StopSignal
from diffusion_rtb.tracker import Tracker
from diffusion_rtb.training_metrics import iteration_metrics, parity
from diffusion_rtb.training_state import attach_posterior, restore_training, save_training

__all__ = ["Trainer"]

ADAM_EPS = 1e-15
"""Next to nothing: a gradient of 1e-9 is as good as one of 1, and an objective may come in any unit."""


class Trainer:
    """Fine-tune the posterior of one run; resumes from the run folder's latest checkpoint.

    Args:
        config: The run.
        folder: Where its metrics, checkpoints and sample grids go.
        prior: Loaded; its adapters are attached here.
        reward: r(x).
        objective: Loss on trajectories.
        accelerator: Devices, gradient reduction.
        tracker: Where metrics go.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        prior: Prior,
        reward: Reward,
        objective: Objective,
        accelerator: Accelerator,
        tracker: Tracker,
    ) -> None:
        self.config = config
        self.folder = folder
        self.prior = prior
        self.objective = objective
        self.accelerator = accelerator
        self.tracker = tracker
        table = config.prompts.table()
        prompts = table.texts
        self.actor = Actor(prior, reward, prompts, config.train.micro_batch, table.metadata)
        self.sources = sources(config)
        self.budget = budget(config)
        check_fitness(config, objective, prior)
        attach_posterior(config, prior)
        check_trainable(prior.parameters())
        torch.manual_seed(seed_of(config.seed, "objective"))
        objective.prepare(len(prompts), prior.dims, prior.features(prompts[:1]).shape[1])
        if isinstance(objective, torch.nn.Module):
            objective.to(prior.device)
        self.uses_kl = bool(getattr(objective, "uses_kl", False))
        self.optimizer = self._optimizer()
        learns = len(self.optimizer.param_groups) > 1
        check_processes(objective, learns, accelerator.num_processes, config.behaviour)
        self.iteration = 0
        self._stop = StopSignal()

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
        train = self.config.train
        with self._stop, self.tracker:
            self.resume()
            if self.iteration == 0:
                self._warm_up()
            while self.iteration < train.iterations and not self.interrupted:
                try:
                    metrics = self.step()
                except Exception:
                    self.save()  # nothing of the failed iteration is in the state
                    raise
                self.tracker.log(self.iteration, metrics)
                self.iteration += 1
                if train.grid_every and self.iteration % train.grid_every == 0:
                    self.sample_grid()
                if train.checkpoint_every and self.iteration % train.checkpoint_every == 0:
                    self.save()
        self.save()

    def _warm_up(self) -> None:
        """Let an objective with a value network learn it from the prior's trajectories, where there are any."""
        buffer, count = self.sources["prior"]
        warm_up = getattr(self.objective, "warm_up", None)
        if count == 0 or warm_up is None:
            return
        assert isinstance(buffer, PriorBuffer)
        held = buffer.everything(self.actor)
        noise = partial(noised, self.prior.pipe.scheduler)
        warm_up(self._terms(replace(held, log_q=held.log_p)), self.config.beta, noise)

    def step(self) -> dict[str, float]:
        """One iteration; returns its metrics."""
        beta = self.beta
        rows = self._rows()
        with observing(self.actor.reward, self.accelerator.gather):
            parts = draw(self.sources, self.actor, rows, self.iteration, beta)
        metrics: dict[str, float] = {}
        for update in range(self.config.train.updates_per_iteration):
            if update > 0:  # the posterior has moved
                parts = {name: replace(part, log_q=None, kl=None) for name, part in parts.items()}
            complete = self.actor.with_kl if self.uses_kl else self.actor.completed
            parts = {name: complete(part) for name, part in parts.items()}
            loss, replayed, norm = self._update(list(parts.values()), beta, update)
            if update == 0:
                shown = [parts[name] for name in ("posterior", "prior") if name in parts]
                metrics = iteration_metrics(shown, loss, replayed, beta) | share_rewards(parts)
                metrics |= {"beta": beta, "gradient_norm": norm}
                first = parts["posterior"]
        settle(self.sources, parts)
        if self.budget is not None:
            moments = self.accelerator.reduce(realised(first), reduction="mean")
            self.budget.settle(moments, learning_rate_factor(self.config.train, self.iteration))
        seconds = self.actor.stopwatch.read()
        return metrics | {f"seconds/{phase}": spent for phase, spent in seconds.items()}

    @property
    def beta(self) -> float:
        """beta of the current iteration; nats per unit of reward."""
        if self.budget is not None:
            return self.budget.beta
        anneal = self.config.beta_anneal
        if anneal is None:
            return self.config.beta
        return annealed(self.config.beta, self.iteration, start=anneal.start, iterations=anneal.iterations)

    def _rows(self) -> list[int]:
        """This process's prompts of the iteration: every prompt once before any comes again."""
        count, total = self.config.train.prompts_per_iteration, len(self.actor.prompts)
        accelerator = self.accelerator
        rows = [nth_prompt(self.config.seed, self.iteration * count + k, total) for k in range(count)]
        return rows[accelerator.process_index :: accelerator.num_processes]

    def _update(
        self, parts: list[Experience], beta: float, update: int
    ) -> tuple[Loss, list[Float[Tensor, "_ steps"]], float]:
        """Objective, backward inside the steps, clip, optimizer; returns the loss, replayed log_q and gradient norm."""
        train = self.config.train
        whole = Experience.cat(parts)
        terms = self._terms(whole)
        self.optimizer.zero_grad()
        with self.actor.stopwatch("objective"):
            loss = self.objective(terms, beta)
            (loss.loss * loss.to_nats).backward()
        assert terms.log_q.grad is not None
        with self.actor.stopwatch("backward"):
            kl_cotangent = None if terms.kl is None else terms.kl.grad
            seed = seed_of(self.config.seed, "steps", self.iteration, update)
            steps = some_steps(parts[0], train.gradient_steps, seed)
            replayed = push_back(
                self.actor, parts, terms.log_q.grad, kl_cotangent, weights=train.step_weights, steps=steps
            )
        if update == 0:  # before the step: a rejected gradient must not reach the parameters
            assert parts[0].log_q is not None
            check_parity(parity(parts[0].log_q, replayed[0]), train.parity_tolerance, self.iteration)
        average_gradients([p for group in self.optimizer.param_groups for p in group["params"]], self.accelerator)
        norm = clip_gradients(self.prior.parameters().values(), train.grad_clip, self.iteration)
        factor = learning_rate_factor(train, self.iteration)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return loss, replayed, norm

    def _terms(self, experience: Experience) -> Terms:
        assert experience.log_q is not None
        assert experience.log_p is not None
        trajectory = experience.trajectory
        # What recorded a trajectory is what drew it: the posterior or the prior, unless exploration noise was added.
        behaviour = trajectory.log_prob if trajectory.log_behaviour is None else trajectory.log_behaviour
        return Terms(
            log_q=experience.log_q.detach().clone().requires_grad_(),
            log_p=experience.log_p.detach(),
            reward=experience.reward.to(experience.log_q),
            prompt=experience.prompt,
            x=trajectory.x,
            timesteps=trajectory.timesteps,
            features=self.prior.features(self.actor.texts(experience.prompt)),
            log_behaviour=behaviour,
            kl=None if experience.kl is None else experience.kl.detach().clone().requires_grad_(),
        )

    # Samples and state

    def sample_grid(self) -> None:
        """Write samples of the posterior, one row per prompt at fixed seeds, to samples/."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "samples" / f"{self.iteration:06d}.png"
        write_sheet(self.actor, self.config.seed, self.config.train.grid_samples, path)
        self.tracker.image("samples", path, self.iteration)
        self.actor.stopwatch.read()

    def save(self) -> None:
        """Write a checkpoint that `resume` continues from number for number."""
        if self.accelerator.is_main_process:
            save_training(self)

    def resume(self) -> None:
        """Continue from the latest checkpoint of the run folder, if there is one."""
        self.iteration = restore_training(self)
        self.tracker.resume(self.iteration)

    @property
    def interrupted(self) -> bool:
        """A signal ended `fit` before the last iteration."""
        return self._stop.came
