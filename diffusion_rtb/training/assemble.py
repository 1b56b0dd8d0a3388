"""From a config to objects: check every name and argument first, then load.

The core imports no pipeline and no reward; only the names in a config lead to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.behaviours._mixture import Mixture, sources
from diffusion_rtb.behaviours._stored_size import check_room
from diffusion_rtb.beta import make_beta
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import AimsStates, Prior
from diffusion_rtb.out_of_memory import doing, remedied
from diffusion_rtb.run.checks import Components, describe_components, paths_explained
from diffusion_rtb.run.folder import hold_run, name_free_again, open_run, run_folder
from diffusion_rtb.run.posterior import TrainedRun, attach_posterior, open_start
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.prompts import check_reward_prompts
from diffusion_rtb.training.chain_checks import check_chain, check_sampler
from diffusion_rtb.training.compatibility import (
    check_gradient,
    check_owner,
    check_processes,
    check_ranked,
    check_reward_memory,
    check_settings,
)
from diffusion_rtb.training.observers import Sheets
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.tracker import Tracker, check_trackers
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.gradient import check_trainable
from diffusion_rtb.training.updates.optimizer import check_optimizer, own_parameters
from diffusion_rtb.training.updates.update import Updates
from diffusion_rtb.training.watch.observer import Hands, Watch
from diffusion_rtb.training.watch.tools import Tools, describe_tools

__all__ = ["assemble", "check_run", "load_sampler", "prepare", "prepare_objective", "training"]


def assemble(config: RunConfig, folder: Path | None = None) -> Trainer:
    """The trainer of a run, in the run's folder; a run that exists already is continued.

    What does not fit together is refused before anything is loaded: see `check_run` and `_built`.
    """
    folder = run_folder(config) if folder is None else folder
    components, mixture, processes = _described(config, folder)
    return _built(config, folder, components, mixture, processes)


@contextmanager
def training(config: RunConfig, folder: Path | None = None) -> Iterator[Trainer]:
    """The trainer of a run in whose folder nobody else can write inside the block; an untrained run's name is free after an error.

    Raises:
        FolderInUseError: another command writes there.
    """
    folder = run_folder(config) if folder is None else folder
    components, mixture, processes = _described(config, folder)
    with ExitStack() as stack:
        with processes.guarded():  # the others wait in `_built` until the main process holds the folder
            stack.enter_context(name_free_again(config, folder, processes.main))
            stack.enter_context(hold_run(folder, processes.main))
            trainer = _built(config, folder, components, mixture, processes)
        yield trainer


def check_run(config: RunConfig, folder: Path) -> tuple[Components, Mixture]:
    """Describe what the config names and refuse what does not fit together; nothing is loaded and nothing is written.

    Raises:
        ValueError: see `describe_components`, `check_trackers`, `compatibility.py` and `chain_checks.py`.
    """
    check_trackers(config.train.tracker)
    check_optimizer(config.train)
    with paths_explained(folder):
        mixture = sources(config)
        components = describe_components(config)
        describe_tools(config)
    check_settings(config, components.objective.construct(), mixture)
    check_gradient(config, components)
    check_ranked(config, components, mixture)
    check_sampler(config, components, mixture)
    open_start(config, folder)
    return components, mixture


def _described(config: RunConfig, folder: Path) -> tuple[Components, Mixture, Processes]:
    components, mixture = check_run(config, folder)
    processes = Processes.start(config.train.process_timeout)
    check_processes(config, mixture, processes.count)
    return components, mixture, processes


def _built(config: RunConfig, folder: Path, components: Components, mixture: Mixture, processes: Processes) -> Trainer:
    """Open the run's folder and build what was described.

    Raises:
        ValueError: the folder holds another config; a component cannot be built, or does not fit the others once it is.
    """
    with processes.guarded():
        start = open_start(config, folder)
        processes.agree()  # all have looked whether there is a checkpoint yet
        told = None if start is None else start.provenance()
        begun = open_run(config, folder, told) if processes.main else None
        processes.agree()  # the others go on once the folder is there
        tracker = Tracker(
            folder,
            config.train.tracker,
            config.train.iterations,
            config=config.model_dump(mode="json"),
            start=0 if begun is None else int(begun.state["iteration"]),
            main=processes.main,
        )
        objective: Any = components.objective.build()
        with remedied(config, "train"):
            tools = _tools(config) if processes.main else None
            sampler = load_sampler(config, folder, components, objective, mixture)
            prepare(config, sampler, objective, processes, start)
    beta, updates = make_beta(config.beta), Updates.of(config, sampler, objective, mixture)
    trainer = Trainer(config, folder, sampler, objective, mixture, beta, processes, updates, [tracker], begun)
    if processes.main:  # after the tracker, before the checkpoints
        trainer.observers.insert(1, _sheets(config, trainer, tracker))
    if tools is not None:  # first: what it sees is in the row that the tracker writes
        hands = Hands(
            trainer.final, lambda: trainer.beta, trainer.save, trainer.leave_alone, tracker.extra, tracker.image
        )
        trainer.observers.insert(0, Watch(config, folder, sampler, tools, hands))
    return trainer


def _tools(config: RunConfig) -> Tools | None:
    """Judges and embedder, loaded: before the prior, whose weights take longer."""
    with warnings.catch_warnings(action="ignore"):  # they were told when the run was checked
        described = describe_tools(config)
    return None if described is None else described.build(config)


def load_sampler(config: RunConfig, folder: Path, components: Components, objective: Any, mixture: Mixture) -> Sampler:
    """Prior and reward, loaded, on the run's prompts; nothing is written."""
    with doing("loading the reward"):
        reward: Any = components.reward.build()
    table = config.prompts.table()
    check_reward_prompts(reward, table.texts, table.metadata)
    check_reward_memory(reward, objective, mixture)
    with doing("loading the prior"):
        prior: Prior = components.prior.build()
    check_chain(config, objective, prior, mixture)
    check_room(config, prior, objective, mixture, folder)
    needs_noise = not isinstance(objective, AimsStates)
    return Sampler(prior, reward, table.texts, config.train.micro_batch, table.metadata, needs_noise=needs_noise)


def prepare(
    config: RunConfig, sampler: Sampler, objective: Any, processes: Processes, start: TrainedRun | None = None
) -> None:
    """Attach the posterior to the prior, that of `start` if there is one; let the objective make its scalars and networks."""
    attach_posterior(config, sampler.prior)
    if start is not None:
        start.hand_over(sampler.prior)
    prepare_objective(config, sampler, objective)
    check_trainable(sampler.prior.parameters())
    check_owner(objective, bool(own_parameters(objective)), processes.count)


def prepare_objective(config: RunConfig, sampler: Sampler, objective: Any) -> None:
    """Let the objective make its scalars and networks, from the run's seed and where the prior is."""
    prior, prompts = sampler.prior, sampler.prompts
    torch.manual_seed(seed_of(config.seed, "objective"))
    objective.prepare(len(prompts), prior.dims, prior.features(prompts[:1]).shape[1])
    if isinstance(objective, torch.nn.Module):
        objective.to(prior.device)


def _sheets(config: RunConfig, trainer: Trainer, tracker: Tracker) -> Sheets:
    train = config.train
    return Sheets(
        trainer.sampler,
        trainer.final,
        config.seed,
        count=train.grid_samples,
        every=train.grid_every,
        folder=trainer.folder / "samples",
        show=tracker.image,
    )
