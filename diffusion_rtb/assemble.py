"""From a config to objects: check every name and argument first, then load.

The core imports no pipeline and no reward; only the names in a config lead to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_rtb import checkpoint
from diffusion_rtb.config import RunConfig, load_config
from diffusion_rtb.fitness import check_settings
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.locate import build, check_component
from diffusion_rtb.reward_prompts import check_component_prompts, check_reward_prompts
from diffusion_rtb.reward_state import load_reward
from diffusion_rtb.runs import open_run
from diffusion_rtb.tracker import Tracker, check_trackers
from diffusion_rtb.trainer import Trainer
from diffusion_rtb.training_state import attach_posterior, load_parameters

__all__ = ["Parts", "assemble", "check_components", "load_posterior", "load_prior", "load_run_reward", "parts"]


def check_components(config: RunConfig) -> None:
    """Check the names and arguments of everything the config names; nothing is loaded.

    Raises:
        ValueError: a component does not exist, or an argument is unknown, missing, of the wrong type or out of range; or the
            reward does not take one of the prompts.
    """
    check_component(config.prior, "prior")
    check_component(config.reward, "reward")
    check_component(config.objective, "objective")
    table = config.prompts.table()
    check_component_prompts(config.reward, table.texts, table.metadata)
    for judge in (config.eval.embedder, config.eval.judge):
        if judge is not None:
            check_component(judge, "reward")


Parts = tuple[RunConfig, Path, Prior, Any, Any, Accelerator, Tracker]
"""What a `Trainer` is made of, in its order."""


def assemble(config: RunConfig) -> Trainer:
    """The trainer of a run, in the run's folder; a run that exists already is continued.

    Raises:
        ValueError: see `parts`.
    """
    return Trainer(*parts(config))


def parts(config: RunConfig) -> Parts:
    """What a run's trainer is made of; what does not fit together is refused before anything is loaded.

    Raises:
        ValueError: see `check_components` and `fitness.py`; or the run's folder holds another config.
    """
    check_components(config)
    check_trackers(config.train.tracker)
    objective: Any = build(config.objective, "objective")
    check_settings(config, objective)
    accelerator = Accelerator()
    with accelerator.main_process_first():
        folder = open_run(config)
    tracker = Tracker(
        folder,
        config.train.tracker,
        config.train.iterations,
        config=config.model_dump(mode="json"),
        main=accelerator.is_main_process,
    )
    reward: Any = build(config.reward, "reward")
    table = config.prompts.table()
    check_reward_prompts(reward, table.texts, table.metadata)
    prior: Prior = build(config.prior, "prior")
    return config, folder, prior, reward, objective, accelerator, tracker


def load_prior(run: Path | str) -> tuple[RunConfig, Prior]:
    """The config of a run, or of a config file, and its prior without any posterior."""
    config = load_config(run)
    check_component(config.prior, "prior")
    return config, build(config.prior, "prior")


def load_run_reward(run: Path, config: RunConfig) -> Any:
    """The reward of a run, with what it had learned (running statistics) at the latest checkpoint."""
    reward = build(config.reward, "reward")
    latest = checkpoint.latest_checkpoint(run / "checkpoints")
    if latest is not None:
        load_reward(reward, checkpoint.load_checkpoint(latest)[0].get("reward", {}))
    return reward


def load_posterior(run: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Prior]:
    """The config of a run and its prior with the latest checkpoint's posterior attached.

    Raises:
        ValueError: the folder is no run, has no checkpoint, or its checkpoint is of another architecture.
    """
    config = load_config(run, overrides)
    check_components(config)
    latest = checkpoint.latest_checkpoint(run / "checkpoints")
    if latest is None:
        raise ValueError(f"{run} has no complete checkpoint: train it first with `python train.py {run}/config.yaml`.")
    tensors, state = checkpoint.load_checkpoint(latest)
    prior: Prior = build(config.prior, "prior")
    attach_posterior(config, prior)
    checkpoint.check_compatible(state["prior"], prior.fingerprint())
    load_parameters(prior, tensors["posterior"])
    return config, prior
