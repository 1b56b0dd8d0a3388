"""From a config to objects: check every name and argument first, then load.

The core imports no pipeline and no reward; only the names in a config lead to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusion_rtb.behaviours._stored_size import check_room
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checkpoint_reading import read_latest
from diffusion_rtb.run.checks import check_components, paths_explained
from diffusion_rtb.run.folder import CHECKPOINTS, hold_run, name_free_again, open_run, run_folder
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.prompts import check_reward_prompts
from diffusion_rtb.training.compatibility import (
    check_configured_steps,
    check_processes,
    check_reward_memory,
    check_settings,
)
from diffusion_rtb.training.observers import Sheets
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.tracker import Tracker, check_trackers
from diffusion_rtb.training.trainer import Trainer

__all__ = ["assemble", "check_components", "check_run", "training"]


def assemble(config: RunConfig, folder: Path | None = None, processes: Processes | None = None) -> Trainer:
    """The trainer of a run, in the run's folder; a run that exists already is continued.

    What does not fit together is refused before anything is loaded.

    Args:
        config: The run's.
        folder: Where it is; None: out/name.
        processes: Those that train it; None: those that were launched.

    Raises:
        ValueError: see `check_run`; or the run's folder holds another config.
    """
    folder = run_folder(config) if folder is None else folder
    check_run(config, folder)
    processes = Processes.start(config.train.process_timeout) if processes is None else processes
    check_processes(config, processes.count)
    with processes.guarded():
        begun = open_run(config, folder) if processes.main else None
        processes.agree()  # the others go on once the folder is there
        begun = begun if processes.main else read_latest(folder / CHECKPOINTS)
        tracker = Tracker(
            folder,
            config.train.tracker,
            config.train.iterations,
            config=config.model_dump(mode="json"),
            start=0 if begun is None else int(begun.state["iteration"]),
            main=processes.main,
        )
        objective: Any = build(config.objective, "objective")
        sampler = _sampler(config, objective, folder)
    observers = [tracker, _sheets(config, folder, sampler, tracker)] if processes.main else [tracker]
    return Trainer(config, folder, sampler, objective, processes, observers, begun)


@contextmanager
def training(config: RunConfig, folder: Path | None = None) -> Iterator[Trainer]:
    """The trainer of a run in whose folder nobody else can write inside the block; an untrained run's name is free after an error.

    Raises:
        ValueError: see `assemble`.
        FolderInUseError: another command writes there.
    """
    folder = run_folder(config) if folder is None else folder
    check_run(config, folder)
    processes = Processes.start(config.train.process_timeout)
    check_processes(config, processes.count)
    with ExitStack() as stack:
        with processes.guarded():  # the others wait in `assemble` until the main process holds the folder
            stack.enter_context(name_free_again(config, folder, processes.main))
            stack.enter_context(hold_run(folder, processes.main))
            trainer = assemble(config, folder, processes)
        yield trainer


def check_run(config: RunConfig, folder: Path) -> None:
    """Refuse what does not fit together; nothing is loaded and nothing is written.

    Raises:
        ValueError: see `check_components`, `check_trackers` and `compatibility.py`.
    """
    with paths_explained(folder):
        check_components(config)
        check_trackers(config.train.tracker)
        objective: Any = build(config.objective, "objective")
        check_settings(config, objective)
        check_configured_steps(config, objective)


def _sampler(config: RunConfig, objective: Any, folder: Path) -> Sampler:
    """Prior and reward, loaded, on the run's prompts."""
    with paths_explained(folder):
        reward: Any = build(config.reward, "reward")
        table = config.prompts.table()
        check_reward_prompts(reward, table.texts, table.metadata)
        check_reward_memory(reward, objective, config.behaviour)
        prior: Prior = build(config.prior, "prior")
    check_room(config, prior, objective, folder)
    return Sampler(prior, reward, table.texts, config.train.micro_batch, table.metadata)


def _sheets(config: RunConfig, folder: Path, sampler: Sampler, tracker: Tracker) -> Sheets:
    train = config.train
    return Sheets(
        sampler,
        config.seed,
        count=train.grid_samples,
        every=train.grid_every,
        folder=folder / "samples",
        show=tracker.image,
    )
