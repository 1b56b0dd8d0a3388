"""A run that was trained, opened once per command: its config, its latest whole checkpoint, and what they build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_rtb.checkpoint import check_compatible
from diffusion_rtb.checkpoint_reading import Checkpoint, read_latest
from diffusion_rtb.components import check_components, paths_explained
from diffusion_rtb.config import RunConfig, load_config
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.locate import build
from diffusion_rtb.progress import Progress, trained_beta
from diffusion_rtb.reward_state import load_reward
from diffusion_rtb.runs import CHECKPOINTS, RunFolderError, check_trained_config, find_run, is_run, run_folder
from diffusion_rtb.training_state import attach_posterior, load_parameters

__all__ = ["TrainedRun", "open_trained_run"]


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run as its latest whole checkpoint left it."""

    folder: Path
    config: RunConfig
    checkpoint: Checkpoint

    @property
    def progress(self) -> Progress:
        """How far the posterior was trained, and for which beta."""
        held = self.checkpoint
        return Progress(
            done=int(held.state["iteration"]),
            asked=self.config.train.iterations,
            beta=trained_beta(self.config, held.state),
            checkpoint=held.path.name,
            passed_over=held.passed_over,
        )

    def prior(self) -> Prior:
        """The prior, loaded, with the posterior attached.

        Raises:
            CheckpointError: the posterior was trained on another prior.
        """
        with paths_explained(self.folder):
            prior: Prior = build(self.config.prior, "prior")
        attach_posterior(self.config, prior)
        check_compatible(self.checkpoint.state["prior"], prior.fingerprint())
        load_parameters(prior, self.checkpoint.tensors["posterior"])
        return prior

    def reward(self) -> Any:
        """The reward, with what it had learned (running statistics)."""
        with paths_explained(self.folder):
            reward = build(self.config.reward, "reward")
        load_reward(reward, self.checkpoint.tensors.get("reward", {}))
        return reward


def open_trained_run(run: Path | str, overrides: Sequence[str] = ()) -> TrainedRun:
    """Read a run's folder; nothing but its checkpoint is loaded.

    Args:
        run: The folder.
        overrides: Of `eval.*`.

    Raises:
        RunFolderError: it is no run's folder, or its config is not the one that was trained.
        ConfigError: its config.yaml is damaged, or an override is wrong.
        CheckpointError: its checkpoint cannot be read.
    """
    run = Path(run).expanduser()
    if run.is_file() or not is_run(run):
        raise RunFolderError(_no_run(run))
    config, _ = find_run(run, overrides)
    with paths_explained(run):
        check_components(config)
    found = read_latest(run / CHECKPOINTS)
    if found is None:
        raise RunFolderError(f"{run} has no complete checkpoint: train it first with `python train.py {run}`.")
    remedy = (
        f"Set them back in {run / 'config.yaml'}, or delete that file: it is then restored from the checkpoint. For other settings "
        f"train another run: python train.py {run} name=ANOTHER KEY=VALUE."
    )
    what = f"{run / 'config.yaml'} is not what its posterior was trained with ({found.path})."
    check_trained_config(config, found.state, found.path, remedy, what=what)
    return TrainedRun(run, config, found)


def _no_run(path: Path) -> str:
    """Why a path is no run, and where its run is or how it gets one."""
    if not path.exists():
        load_config(path)  # says what is there instead
    if path.is_file():
        if is_run(path.parent):
            return f"{path} is a file in a run's folder: give that folder, {path.parent}."
        folder = run_folder(load_config(path))
        if is_run(folder):
            return f"{path} is a config, and a run's folder is asked for: give {folder}."
        return f"{path} is a config, and its run in {folder} is not there yet: train it with `python train.py {path}`."
    if (path / "config.yaml").is_file():
        return f"{path} has a config.yaml and no training yet: train it first with `python train.py {path}`."
    return f"{path} is no run's folder: it has neither config.yaml nor checkpoints."
