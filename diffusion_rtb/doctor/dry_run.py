"""Two iterations of a run's own trainer, without a folder to write into: what they take, and that nothing stays of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import psutil
import torch

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.behaviours._mixture import Mixture
from diffusion_rtb.beta import make_beta
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.doctor.sizes import bytes_of, optimizer_bytes
from diffusion_rtb.interfaces import Objective, Prior, RefinesValue, WarmsUp
from diffusion_rtb.reward_check.measures import peak_memory
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.rounding_floor import trained_networks
from diffusion_rtb.training.state import load, snapshot
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.update import Updates
from diffusion_rtb.training.warm_up import warm_up

__all__ = ["Calls", "DryRun", "Timed", "dry_config", "dry_run"]

MIB = 2**20

UPDATES = 20
"""Of V before the dry iterations, at most."""


@dataclass(frozen=True)
class Timed:
    """Seconds per trajectory."""

    rollout: float
    reward: float
    score: float


@dataclass
class Calls:
    """Evaluations of the networks that are trained."""

    count: int = 0
    rows: int = 0
    """Of the largest: trajectories, twice as many with classifier-free guidance in one call."""


@dataclass(frozen=True, eq=False)
class DryRun:
    """What two iterations came to. The first fills memories and caches; the second is what an iteration costs."""

    prompts: int
    """Of one dry iteration."""
    trajectories: int
    """Of one dry iteration."""
    first: Mapping[str, float]
    """Metrics of the first, the posterior being the prior still."""
    first_seconds: float
    seconds: float
    """Of the second."""
    cpu_seconds: float
    """Of this process in the second."""
    warm_up: float
    """Seconds of one update of V; 0 for an objective that does not warm up."""
    phases: Mapping[str, float]
    """Seconds of its parts, as `seconds/...` of metrics.jsonl."""
    calls: Calls
    """Of the second."""
    peak: int
    """Bytes at most: allocated on the accelerator, or resident in the process."""
    checkpoint: Mapping[str, int]
    """Bytes of the tensors of a checkpoint, by file; without what behaviours remember."""
    optimizer: int
    """Bytes of its state."""
    untouched: int
    """Trained parameters that got no gradient."""
    mixture: Mixture
    """Its behaviours, with what they remember by now."""


def dry_config(config: RunConfig, shares: Sequence[int]) -> RunConfig:
    """The config with as few prompts per iteration as fill one micro-batch, and nothing that would stop at what is found.

    Time and trajectories are proportional to the prompts where the number of micro-batches is: so few that it is.

    Args:
        config: The run's.
        shares: Trajectories per prompt of each behaviour.
    """
    train = config.train
    whole, size = train.prompts_per_iteration, train.micro_batch

    def proportional(prompts: int) -> bool:
        return all(-(-prompts * n // size) * whole == prompts * -(-whole * n // size) for n in shares)

    least = min(whole, -(-size // train.group))
    prompts = next(n for n in range(least, whole + 1) if proportional(n))
    changed = {"prompts_per_iteration": prompts, "parity_tolerance": math.inf, "rounding_share": None}
    return config.model_copy(update={"train": train.model_copy(update=changed)})


def dry_run(
    config: RunConfig, folder: Path, sampler: Sampler, objective: Objective, mixture: Mixture, processes: Processes
) -> DryRun:
    """Two iterations of a trainer that is asked for no checkpoint; posterior, objective, reward and generators are put back.

    An objective that warms up does so first, by a few updates: its first gradient would else be that of a V that knows nothing.

    Args:
        config: See `dry_config`.
        folder: The run's; a trainer that is not asked to `fit` or `save` does not touch it.
        sampler: On as many prompts as an iteration has.
        objective: Prepared.
        mixture: The behaviours, made for this.
        processes: One.
    """
    beta, updates = make_beta(config.beta), Updates.of(config, sampler, objective, mixture)
    trainer = Trainer(config, folder, sampler, objective, mixture, beta, processes, updates)
    before = snapshot(trainer.parts)
    peak = _allocated(sampler.prior.device)
    try:
        with peak_memory(sampler.prior.device) as memory:
            update = _warmed_up(config, sampler, objective, mixture)
            first_seconds, first, _ = _iteration(trainer, nullcontext)
            cpu = process_time()
            seconds, metrics, calls = _iteration(trainer, lambda: _counted(sampler.prior))
            cpu = process_time() - cpu
        states = {name: part.state() for name, part in trainer.parts.items()}
        checkpoint = {name: bytes_of(state.tensors.values()) for name, state in states.items()}
        untouched = sum(parameter.grad is None for parameter in sampler.prior.parameters().values())
        optimizer = optimizer_bytes(trainer.optimizer)
    finally:
        load(trainer.parts, before)
    return DryRun(
        prompts=config.train.prompts_per_iteration,
        trajectories=config.train.prompts_per_iteration * config.train.group,
        first=first,
        first_seconds=first_seconds,
        seconds=seconds,
        cpu_seconds=cpu,
        warm_up=update,
        phases={name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")},
        calls=calls,
        peak=peak + round(memory.mib * MIB),
        checkpoint=checkpoint,
        optimizer=optimizer,
        untouched=untouched,
        mixture=mixture,
    )


def _warmed_up(config: RunConfig, sampler: Sampler, objective: Any, mixture: Mixture) -> float:
    """Seconds of an update of V, by a few of them on trajectories of the prior that are drawn before."""
    updates = ObjectiveTraits.of(objective).warm_up_updates
    if not isinstance(objective, WarmsUp) or updates == 0:
        return 0.0
    buffer, _ = mixture.prior
    buffer.everything(sampler)
    tried = min(UPDATES, updates or UPDATES)
    held: Any = objective
    rounds = held.warm_up_rounds if isinstance(objective, RefinesValue) else 0
    held.warm_up_updates = tried
    if rounds:
        held.warm_up_rounds = 0
    try:
        start = perf_counter()
        warm_up(objective, sampler, buffer, True, config.beta.value, lambda: None)
        return (perf_counter() - start) / tried
    finally:
        held.warm_up_updates = updates
        if rounds:
            held.warm_up_rounds = rounds


def _iteration(trainer: Trainer, around: Callable[[], Any]) -> tuple[float, dict[str, float], Any]:
    with around() as seen:
        start = perf_counter()
        metrics = trainer.step()  # its last numbers are read by the host: nothing is left on an accelerator
        seconds = perf_counter() - start
    trainer.iteration += 1
    return seconds, metrics, seen


@contextmanager
def _counted(prior: Prior) -> Iterator[Calls]:
    """Count the calls of the networks that hold the posterior."""
    calls = Calls()

    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1]
        calls.count += 1
        calls.rows = max(calls.rows, max((len(tensor) for tensor in tensors), default=0))

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in trained_networks(prior)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _allocated(device: torch.device) -> int:
    """Bytes in use now: of an accelerator those of torch, on a CPU those of the process."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.get_device_module(device).memory_allocated(device))
