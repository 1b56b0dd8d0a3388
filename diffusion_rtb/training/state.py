"""Everything a run needs to continue number for number, to and from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_rtb.behaviours.mixture import Mixture
from diffusion_rtb.beta import Beta
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Objective, Prior
from diffusion_rtb.run import checkpoint
from diffusion_rtb.run.checkpoint_reading import Checkpoint, read_latest
from diffusion_rtb.run.folder import CHECKPOINTS
from diffusion_rtb.run.posterior import load_parameters
from diffusion_rtb.run.progress import Progress, trained_beta
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import load_reward, reward_tensors
from diffusion_rtb.training.processes import Processes

__all__ = ["Snapshot", "TrainingState", "load_snapshot", "progress", "restore_training", "save_training", "snapshot"]

log = logging.getLogger(__name__)

Snapshot = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Groups of tensors by name, and what is no tensor."""


@runtime_checkable
class TrainingState(Protocol):
    """The parts of a trainer that a checkpoint holds."""

    config: RunConfig
    folder: Path
    prior: Prior
    sampler: Sampler
    objective: Objective
    optimizer: torch.optim.AdamW
    sources: Mixture
    target: Beta
    processes: Processes
    iteration: int
    warmed: bool
    """The objective's warm-up is done."""
    begun: Checkpoint | None
    """Where the run goes on from, if that was read already."""

    @property
    def beta(self) -> float: ...


def save_training(run: TrainingState) -> Path:
    """Write posterior, objective, optimizer, random states, buffers and counters; atomically, see `run/checkpoint.py`."""
    tensors, state = _state(run)
    tensors |= {f"source-{name}": source.tensors() for name, (source, _) in run.sources.items()}
    state |= {"prior": run.prior.fingerprint(), "config": run.config.model_dump(mode="json")}
    keep = run.config.train.keep_checkpoints
    return checkpoint.save_checkpoint(run.folder / CHECKPOINTS, run.iteration, tensors, state, keep)


def snapshot(run: TrainingState) -> Snapshot:
    """A copy, on the CPU, of everything that an iteration changes before it has succeeded.

    That is all but the memories of behaviours, which change in `settle`, after it has.
    """
    tensors, state = _state(run)
    copies = {
        group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in held.items()}
        for group, held in tensors.items()
    }
    return copies, state


def load_snapshot(run: TrainingState, before: Snapshot) -> None:
    """Put back what `snapshot` copied."""
    tensors, state = before
    load_parameters(run.prior, tensors["posterior"])
    if isinstance(run.objective, torch.nn.Module):
        run.objective.load_state_dict(dict(tensors["objective"]))
    run.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors["optimizer"], state["optimizer"]))
    checkpoint.set_rng_state(tensors["rng"])
    load_reward(run.sampler.reward, tensors.get("reward", {}))
    run.target.load(float(state["beta"]))
    run.iteration = int(state["iteration"])
    run.warmed = bool(state.get("warmed", run.iteration > 0))


def _state(run: TrainingState) -> Snapshot:
    optimizer, optimizer_state = checkpoint.pack_optimizer(run.optimizer.state_dict())
    tensors: dict[str, dict[str, Tensor]] = {
        "posterior": {name: p.detach() for name, p in run.prior.parameters().items()},
        "objective": dict(run.objective.state_dict()),
        "optimizer": optimizer,
        "rng": checkpoint.rng_state(),
        "reward": reward_tensors(run.sampler.reward),
    }
    state = {
        "iteration": run.iteration,
        "warmed": run.warmed,
        "beta": run.beta,
        "processes": run.processes.count,
        "optimizer": optimizer_state,
    }
    return tensors, state


def restore_training(run: TrainingState) -> None:
    """Load the latest complete checkpoint of the run's folder, if there is one.

    Raises:
        CheckpointError: it was written with another prior, sampler or adapter.
    """
    found, run.begun = read_latest(run.folder / CHECKPOINTS, run.begun), None
    if found is None:
        return
    tensors, state = found.tensors, found.state
    checkpoint.check_compatible(state["prior"], run.prior.fingerprint())
    count = state.get("processes", run.processes.count)
    if count != run.processes.count and run.processes.main:
        log.warning(
            "The checkpoint at iteration %d was written by %d processes, this run has %d. They draw the same trajectories and add "
            "them up in another order: numbers agree up to rounding, not to the last digit.",
            state["iteration"],
            count,
            run.processes.count,
        )
    load_snapshot(run, (tensors, state))
    for name, (source, _) in run.sources.items():
        source.load(tensors.get(f"source-{name}", {}))


def progress(run: TrainingState) -> Progress:
    """How far a trainer has come."""
    beta = trained_beta(run.config, {"iteration": run.iteration, "beta": run.beta})
    return Progress(run.iteration, run.config.train.iterations, beta)
