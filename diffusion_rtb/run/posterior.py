"""A run that was trained, opened once per command: its config, its latest whole checkpoint, and what they build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_rtb.config.arguments import call_arguments
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.run.best import read_best
from diffusion_rtb.run.checkpoint import check_compatible
from diffusion_rtb.run.checkpoint_reading import (
    AVERAGE,
    TENSORS,
    Checkpoint,
    CheckpointError,
    latest_state,
    read_chosen,
    read_latest,
    read_manifest,
)
from diffusion_rtb.run.checks import Components, describe_components, describe_prior, paths_explained
from diffusion_rtb.run.folder import (
    CHECKPOINTS,
    RunFolderError,
    check_trained_config,
    find_run,
    is_run,
)
from diffusion_rtb.run.members import check_attached, check_prior_members
from diffusion_rtb.run.process_state import load_parameters
from diffusion_rtb.run.progress import Progress, trained_beta
from diffusion_rtb.scoring.memory import load_reward

__all__ = ["TrainedRun", "attach_posterior", "load_prior", "open_start", "open_trained_run"]


def load_prior(run: Path | str) -> tuple[RunConfig, Prior]:
    """The config of a run, or of a config file, and its prior without any posterior."""
    config, folder = find_run(run)
    with paths_explained(folder), doing("loading the prior"):
        return config, describe_prior(config).build()


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run as a whole checkpoint left it."""

    folder: Path
    config: RunConfig
    checkpoint: Checkpoint
    components: Components
    chosen: str = ""
    """Why it is this checkpoint and not the latest one; empty: it is the latest."""

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
            chosen=self.chosen,
            ema=self.config.train.ema,
        )

    @property
    def weights(self) -> str:
        """The part of the checkpoint that is the posterior: its last numbers, or their moving average where the run has one."""
        return "posterior" if self.config.train.ema is None else AVERAGE

    def prior(self) -> Prior:
        """The prior, loaded, with the posterior attached.

        Raises:
            CheckpointError: the posterior was trained on another prior.
        """
        with paths_explained(self.folder), doing("loading the prior"):
            prior: Prior = self.components.prior.build()
        attach_posterior(self.config, prior)
        check_compatible(self.checkpoint.state["prior"], prior.fingerprint())
        load_parameters(prior, self.checkpoint.tensors[self.weights])
        return prior

    def hand_over(self, prior: Prior) -> None:
        """Let the posterior attached to another run's prior be this one.

        Raises:
            CheckpointError: it is another prior, or another adapter.
        """
        check_compatible(
            self.checkpoint.state["prior"],
            prior.fingerprint(),
            what=f"start: a run cannot start from {self.checkpoint.path}, whose posterior is of another prior or adapter:",
            remedy="Give this run the prior and `posterior` of that one, or start from another, or from the prior (start: null).",
        )
        load_parameters(prior, self.checkpoint.tensors[self.weights])

    def provenance(self) -> dict[str, Any]:
        """What the manifest of a run that starts from this one says of it."""
        weights = read_manifest(self.checkpoint.path)[0][f"{self.weights}{TENSORS}"][1]
        told = {"run": str(self.folder), "name": self.config.name, "posterior_sha256": weights, "weights": self.weights}
        return told | self.progress.as_json() | {"start": self.config.start}

    def reward(self) -> Any:
        """The reward, with what it had learned (running statistics)."""
        with paths_explained(self.folder), doing("loading the reward"):
            reward = self.components.reward.build()
        load_reward(reward, self.checkpoint.tensors.get("reward", {}))
        return reward


def open_trained_run(run: Path | str, overrides: Sequence[str] = (), *, checkpoint: str = "latest") -> TrainedRun:
    """Read a run's folder, with overrides of `eval.*`; nothing but its checkpoint is loaded.

    Args:
        run: The folder.
        overrides: Of `eval.*`.
        checkpoint: "latest", the newest whole one; "best" by the policy of `watch`; or an iteration that was kept.

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
        components = describe_components(config)
    found, chosen = _opened(run, checkpoint)
    remedy = (
        f"Set them back in {run / 'config.yaml'}, or delete that file: it is then restored from the checkpoint. For other settings "
        f"train another run: python train.py {run} name=ANOTHER KEY=VALUE."
    )
    what = f"{run / 'config.yaml'} is not what its posterior was trained with ({found.path})."
    check_trained_config(config, found.state, found.path, remedy, what=what)
    return TrainedRun(run, config, found, components, chosen)


def _opened(run: Path, which: str) -> tuple[Checkpoint, str]:
    """A checkpoint of the run, and why it is not the latest one."""
    folder = run / CHECKPOINTS
    if which != "latest":
        found = read_chosen(folder, which)
        best = read_best(folder) if which == "best" else None
        return found, "asked for" if best is None else f"the best by {best.policy}"
    latest = read_latest(folder, memories=False)
    if latest is None:
        raise RunFolderError(f"{run} has no complete checkpoint: train it first with `python train.py {run}`.")
    return latest, ""


def open_start(config: RunConfig, folder: Path) -> TrainedRun | None:
    """The run that a run starts from; None where that is the prior, or the run in `folder` has begun and goes on from itself.

    Raises:
        ValueError: `start` is no run that was trained; see `open_trained_run`.
    """
    if config.start is None or latest_state(folder / CHECKPOINTS) is not None:
        return None
    try:
        return open_trained_run(config.start)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"start: {error}") from error


def _no_run(path: Path) -> str:
    """Why a path is no run, and where its run is or how it gets one."""
    if (path / "config.yaml").is_file():
        return f"{path} has a config.yaml and no training yet: train it first with `python train.py {path}`."
    if path.is_dir():
        return f"{path} is no run's folder: it has neither config.yaml nor checkpoints."
    if path.is_file() and is_run(path.parent):
        return f"{path} is a file in a run's folder: give that folder, {path.parent}."
    _, folder = find_run(path)  # where there is none, its error says what is there instead
    if is_run(folder):
        return f"{path} is a config, and a run's folder is asked for: give {folder}."
    return f"{path} is a config, and its run in {folder} is not there yet: train it with `python train.py {path}`."


def attach_posterior(config: RunConfig, prior: Prior) -> None:
    """Make the trainable part of the prior's network as the config asks for, with the run's seed where `attach` takes one.

    Raises:
        ValueError: the prior is not what it will be taken for, see `members.py`; or `attach` does not take what `posterior` holds.
    """
    check_prior_members(prior)
    what = f"posterior: attach of prior {config.prior.component!r}"
    prior.attach(**call_arguments(what, prior.attach, config.posterior, {"seed": config.seed}))
    check_attached(prior, config.prompts.texts()[0])
