r"""Rows of one pipeline call as particles: weighed, and chosen among, inside the scheduler's `step`.

At the step from x_t the pipeline has evaluated its network, so x0_hat(x_t) and with it the value of the state cost no further
call of it. Rows are therefore chosen *before* the step is made, with their network outputs, and each survivor draws its own noise:

    log w += beta·V(x_t) - beta·V(x_before)              where a row stands now, and where it stood when last weighed
    rows of a group  <-  chosen by w;  log Z += log mean w;  log w = 0

The end is weighed by the reward itself, so exp(log Z) is an unbiased estimate of E_p[exp(beta·r)] for any V, if each row is
chosen w / mean(w) times on average, also where a rule that looks at the weights decides when to choose.

Unbiasedness: Del Moral 2004, https://doi.org/10.1007/978-1-4684-9393-1; with a rule: Whiteley, Lee, Heine 2016,
https://doi.org/10.3150/14-BEJ666
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.forward_process import denoised, network_predicts, signal_and_noise
from diffusion_rtb.chain.normal import precise
from diffusion_rtb.chain.recordable import DeterministicStepError, check_single_step
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import LOG_DENSITY
from diffusion_rtb.chain.scheduler import StepCall, previous_sample, with_previous_sample
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.needs import instead
from diffusion_rtb.resampling import systematic_resample
from diffusion_rtb.steering._aim import Aim, State

__all__ = ["Choose", "Particles", "resampled"]

Choose = Callable[[Float[Tensor, " size"], torch.Generator, bool], Int[Tensor, " size"] | None]
"""(log w of a group, its generator, whether the chain has ended) -> the row that each row goes on from; None: each from itself."""


def resampled(threshold: float) -> Choose:
    """Systematic re-sampling where the effective sample size is below a share of the rows, and at the end, in random order."""

    def choose(log_w: Float[Tensor, " size"], generator: torch.Generator, end: bool) -> Int[Tensor, " size"] | None:
        if not end and float(_ess(log_w[None])) >= threshold * (1 - 1e-9):
            return None
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        rows = systematic_resample(torch.softmax(log_w, 0), len(log_w), u)
        return rows[torch.randperm(len(log_w), generator=generator)] if end else rows

    return choose


class Particles(TrajectoryRecorder):
    """A recorder whose rows are chosen among on the way; `trajectory` is that of each survivor's ancestors.

    Args:
        scheduler: Of the pipeline.
        aim: What the weights are made of.
        size: Rows of a group, adjacent in the call.
        choose: Who goes on.
        every: Steps from one weighing to the next; None: only the end is weighed.
        temper: r(x0_hat) counts signal^temper of what it is; a value that is given (`Aim.value`) counts in full.
        weighs: Whether `choose` takes a row w / mean(w) times on average, so that log Z is known.
        needs_noise: Refuse a chain without noise.
        seeds: One per group; None: 0, 1, ….
        generators: See `TrajectoryRecorder`.
        as_prior: Its `prior`.
        means: Keep those of the network's transitions.

    Raises:
        ValueError: as `TrajectoryRecorder`; the scheduler is multistep, or the rows of the call are no whole groups, or the
            pipeline stopped before the end of its schedule.
    """

    def __init__(
        self,
        scheduler: Any,
        aim: Aim,
        *,
        size: int,
        choose: Choose,
        every: int | None = 1,
        temper: float = 0.0,
        weighs: bool = True,
        needs_noise: bool = True,
        seeds: Sequence[int] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        as_prior: Callable[[], AbstractContextManager[None]] | None = None,
        means: bool = False,
    ) -> None:
        super().__init__(scheduler, dtype=LOG_DENSITY, generators=generators, prior=as_prior)
        self._keeps_means = means
        self.aim, self.size, self.choose, self.every, self.weighs = aim, size, choose, every, weighs
        self.temper, self.needs_noise, self.seeds = temper, needs_noise, seeds
        self._reset()

    def _reset(self) -> None:
        self.parents: list[Tensor | None] = []
        """Of each step, the row of the state before it that each of its rows began from; last, of the end."""
        self.ess: list[Tensor] = []
        """Effective sample size of each group as a share, whenever it was weighed; (groups,)."""
        self._means: list[Tensor] = []
        self._reward: Tensor | None = None

    def __enter__(self) -> Particles:
        if self.every is not None:
            check_single_step(self.scheduler)
        self._reset()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None and self.steps and self._reward is None:
            raise ValueError(
                f"The pipeline made {len(self.steps)} steps and stopped before the end of its schedule, so nothing was weighed by "
                "its reward. Call it for the whole schedule."
            )

    # What became of it

    @property
    def reward(self) -> Float[Tensor, " rows"]:
        """r of each row as it was handed out; reward units."""
        return self._ended(self._reward)

    @property
    def log_z(self) -> Float[Tensor, " groups"]:
        """log of the unbiased estimate of E_p[exp(beta·r)] by each group; nats.

        Raises:
            RuntimeError: the rule of choice knows none.
        """
        self._ended(self._reward)
        if not self.weighs:
            raise RuntimeError("The best ones were chosen, whatever their weights: that says nothing of log Z.")
        return self._log_z

    @property
    def trajectory(self) -> Trajectory:
        """That of each row's own ancestors."""
        raw, states = super().trajectory, self._lineage()
        return Trajectory(
            x=_along(raw.x, states),
            timesteps=raw.timesteps,
            std=raw.std,
            log_prob=_along(raw.log_prob, states[:, 1:]),
            log_behaviour=None if raw.log_behaviour is None else _along(raw.log_behaviour, states[:, 1:]),
            output_norm=None if raw.output_norm is None else _along(raw.output_norm, states[:, 1:]),
        )

    @property
    def means(self) -> Float[Tensor, "rows steps *dims"] | None:
        """Of each row's own ancestors: the mean of the transition that the network makes, unsteered; None: they were not kept."""
        return _along(torch.stack(self._means, dim=1), self._lineage()[:, 1:]) if self._means else None

    def _lineage(self) -> Int[Tensor, "rows steps_and_one"]:
        """Which row of the call each state of a row that was handed out is in."""
        self._ended(self._reward)
        row = torch.arange(len(self.steps[-1].x_s), device=self._device)
        lineage: list[Tensor] = []
        for parents in reversed(self.parents):
            row = row if parents is None else parents[row]
            lineage.insert(0, row)
        return torch.stack(lineage, dim=1)

    def _ended(self, reward: Tensor | None) -> Tensor:
        if reward is None:
            raise RuntimeError("Nothing was steered: call the pipeline inside the with block.")
        return reward

    # On the way

    def _record(self, call: StepCall) -> Any:
        self._check_state(call)
        if not self.steps:
            self._begin(call)
        i, parents = len(self.steps), None
        if self.every is not None and i % self.every == 0:
            parents = self._chosen(self._promised(self._state(call)), end=False)
        self.parents.append(parents)
        if parents is not None:
            call = call.at(call.sample[parents], call.model_output[parents])
        output = self._transit(call)
        return self._end(output) if len(self.steps) == self._length else output

    def _begin(self, call: StepCall) -> None:
        """What is known once the pipeline is there: its rows, and where its steps lie in the schedule."""
        rows = len(call.sample)
        if rows % self.size:
            raise ValueError(
                f"The pipeline was called for {rows} samples, which are no whole groups of {self.size} particles: ask for some."
            )
        schedule = torch.as_tensor(self.scheduler.timesteps)
        schedule = schedule if schedule.is_floating_point() else schedule.float()
        first = int((schedule.double().cpu() - call.timestep).abs().argmin())
        self._length = len(schedule) - first
        self._device = call.sample.device
        if self.every is not None and self.aim.value is None:
            network_predicts(self.scheduler)  # refused before the first step, if at all
        if self.every is not None:
            self._signals = [x.tolist() for x in signal_and_noise(self.scheduler, schedule)]
        self._first, groups = first, rows // self.size
        seeds = range(groups) if self.seeds is None else self.seeds
        if len(seeds) != groups:
            raise ValueError(f"{len(seeds)} seeds for {groups} groups of {self.size} particles: give one per group.")
        self._choosers = [torch.Generator().manual_seed(seed_of(seed, "choice")) for seed in seeds]
        self._log_w = torch.zeros(groups, self.size, dtype=torch.float64)
        self._before = torch.zeros(rows, dtype=torch.float64)
        self._log_z = torch.zeros(groups, dtype=torch.float64)

    def _promised(self, state: State) -> Float[Tensor, " rows"]:
        """beta·V of each row; nats."""
        return self.aim.at(state) * (1.0 if self.aim.value is not None else state.signal**self.temper)

    def _state(self, call: StepCall) -> State:
        i = len(self.steps)
        a, b = (values[self._first + i] for values in self._signals)

        def estimate() -> Tensor:
            x_t, output = precise(call.sample), precise(call.model_output)
            return denoised(network_predicts(self.scheduler), x_t, output, a, b).to(call.sample.dtype)

        return State(call.sample, call.timestep, i, a**2 / (a**2 + b**2), estimate)

    def _chosen(self, nats: Float[Tensor, " rows"], *, end: bool) -> Int[Tensor, " rows"] | None:
        """Weigh the rows by where they stand now, and choose."""
        self._log_w += (nats - self._before).unflatten(0, self._log_w.shape)
        self._before = nats
        self.ess.append(_ess(self._log_w))
        parents = torch.arange(len(nats)).unflatten(0, self._log_w.shape).clone()
        moved = False
        for g, log_w in enumerate(self._log_w.clone()):
            rows = self.choose(log_w, self._choosers[g], end)
            if rows is not None:
                moved = True
                parents[g] = parents[g][rows]
                self._log_z[g] += torch.logsumexp(log_w, 0) - math.log(self.size)
                self._log_w[g] = 0
        if not moved:
            return None
        self._before = nats[parents.flatten()]
        return parents.flatten().to(self._device)

    def _end(self, output: Any) -> Any:
        """Weigh by the reward itself; what is handed out are draws from the posterior, as far as that was reached."""
        x_0 = previous_sample(output)
        reward = self.aim.end(x_0)
        parents = self._chosen(self.aim.beta * reward, end=True)
        self.parents.append(parents)
        self._reward = reward if parents is None else reward[parents.cpu()]
        return output if parents is None else with_previous_sample(output, x_0[parents])

    def _append(self, call: StepCall, output: Any, mean: Tensor, std: float) -> Any:
        if self._keeps_means:
            self._means.append(mean.detach())
        return super()._append(call, output, mean, std)

    def _refuse(self, timestep: float, *, begun: bool) -> None:
        if not self.needs_noise:
            return
        try:
            super()._refuse(timestep, begun=begun)
        except DeterministicStepError as error:
            raise DeterministicStepError(f"{error} {instead('noise', 'steering')}", begun=begun) from None


def _along(
    states: Float[Tensor, "rows steps *dims"], row: Int[Tensor, "rows steps"]
) -> Float[Tensor, "rows steps *dims"]:
    """Each row's own entry of every step."""
    return states[row, torch.arange(states.shape[1], device=states.device)]


def _ess(log_w: Float[Tensor, "groups size"]) -> Float[Tensor, " groups"]:
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp() / log_w.shape[1]
