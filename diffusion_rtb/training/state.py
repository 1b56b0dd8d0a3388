"""Everything a run needs to continue number for number: parts that have state, to and from a checkpoint.

The same parts are copied before an iteration, put back where it fails, written to a checkpoint and read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.interfaces import Objective
from diffusion_rtb.run.checkpoint import check_compatible, save_checkpoint
from diffusion_rtb.run.checkpoint_reading import Checkpoint
from diffusion_rtb.run.memories import Memories
from diffusion_rtb.run.process_state import (
    load_parameters,
    pack_optimizer,
    rng_state,
    set_rng_state,
    unpack_optimizer,
)
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import load_reward, reward_tensors

__all__ = [
    "Facts",
    "Part",
    "State",
    "load",
    "load_training",
    "parts_of",
    "save_training",
    "snapshot",
    "tensors_alone",
]


@dataclass(frozen=True, eq=False)
class State:
    """What a part consists of."""

    tensors: Mapping[str, Tensor]
    values: Any = None
    """What JSON can hold; None: the part is tensors alone."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a run that changes while it is trained, by what gives and what takes all of it."""

    state: Callable[[], State]
    """Its tensors may be the ones in use."""
    load: Callable[[State], object]
    """Go on from what `state` gave."""


def tensors_alone(give: Callable[[], Mapping[str, Tensor]], take: Callable[[Mapping[str, Tensor]], object]) -> Part:
    """A part without other values."""
    return Part(lambda: State(give()), lambda state: take(state.tensors))


def parts_of(sampler: Sampler, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """What every run has: posterior, objective, optimizer, the reward's memory, and the global generators."""
    prior = sampler.prior

    def take(tensors: Mapping[str, Tensor]) -> None:
        if isinstance(objective, torch.nn.Module):
            objective.load_state_dict(dict(tensors))

    return {
        "posterior": tensors_alone(prior.parameters, partial(load_parameters, prior)),
        "objective": tensors_alone(objective.state_dict, take),
        "optimizer": Part(
            lambda: State(*pack_optimizer(optimizer.state_dict())),
            lambda state: optimizer.load_state_dict(unpack_optimizer(state.tensors, state.values)),
        ),
        "rng": tensors_alone(rng_state, set_rng_state),
        "reward": tensors_alone(
            lambda: reward_tensors(sampler.reward), lambda tensors: load_reward(sampler.reward, tensors)
        ),
    }


def snapshot(parts: Mapping[str, Part]) -> dict[str, State]:
    """A copy of the parts, on the CPU."""
    states = {name: part.state() for name, part in parts.items()}
    return {
        name: replace(state, tensors={key: t.detach().to("cpu", copy=True) for key, t in state.tensors.items()})
        for name, state in states.items()
    }


def load(parts: Mapping[str, Part], states: Mapping[str, State]) -> None:
    """Put every part back to its state."""
    for name, part in parts.items():
        part.load(states[name])


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of a run besides its parts."""

    iteration: int
    """Iterations done."""
    warmed: bool
    """The objective's warm-up is done."""
    processes: int
    """That wrote it."""
    prior: dict[str, Any]
    """The prior's fingerprint."""


def save_training(
    folder: Path, facts: Facts, parts: Mapping[str, Part], config: Mapping[str, Any], keep: int, on_disk: Memories
) -> Path:
    """Write all parts, see `save_checkpoint`: their tensors are a file each, their values are in state.json under their name."""
    states = {name: part.state() for name, part in parts.items()}
    tensors = {name: {key: tensor.detach() for key, tensor in state.tensors.items()} for name, state in states.items()}
    values = {name: state.values for name, state in states.items() if state.values is not None}
    found = vars(facts) | values | {"config": dict(config)}
    return save_checkpoint(folder, facts.iteration, tensors, found, keep, on_disk)


def load_training(found: Checkpoint, facts: Facts, parts: Mapping[str, Part]) -> Facts:
    """Put all parts to where a checkpoint left them; returns where the run was, `facts` are of this run as it is.

    Raises:
        CheckpointError: it was written with another prior, sampler or adapter, or by another version.
    """
    check_compatible(found.state["prior"], facts.prior)
    was = Facts(**{name: found.state[name] for name in vars(facts)})
    valued = {name: part.state().values is not None for name, part in parts.items()}
    load(parts, {name: State(found.tensors[name], found.state[name] if valued[name] else None) for name in parts})
    return was
