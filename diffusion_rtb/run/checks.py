"""Check what a config names, before anything is loaded; and say from where its relative paths count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_rtb.abilities import ChecksPosterior, ReadsPrompts
from diffusion_rtb.config.component_errors import naming
from diffusion_rtb.config.components import Described, attach_arguments, describe
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.prompts import PromptTable
from diffusion_rtb.config.sections import EvalConfig, judge_name
from diffusion_rtb.run.manifest import last_directory
from diffusion_rtb.scoring.prompts import check_component_prompts

__all__ = [
    "Components",
    "EvalTools",
    "check_posterior",
    "describe_components",
    "describe_prior",
    "describe_tools",
    "paths_explained",
    "told_of",
]


@dataclass(frozen=True)
class EvalTools:
    """What `eval:` names, checked; nothing of it is loaded until it is built."""

    embedder: Described | None
    labeller: Described | None
    judges: Mapping[str, Described]
    """Held-out rewards by name."""
    metrics: tuple[Described, ...]


@dataclass(frozen=True)
class Components:
    """What a config names, checked; nothing of it is loaded until it is built."""

    prior: Described
    reward: Described
    objective: Described
    eval: EvalTools


def describe_components(config: RunConfig) -> Components:
    """Check the names and arguments of everything the config names; nothing is loaded.

    Raises:
        ValueError: a component does not exist, or an argument is unknown, missing, of the wrong type or out of range; or the
            prior, the reward or a judge does not take one of the prompts.
    """
    prior, reward = describe_prior(config), describe(config.reward, "reward")
    check_posterior(prior, config.posterior)
    objective = describe(config.objective, "objective")
    for behaviour in config.behaviours:
        describe(behaviour, "behaviour")
    table, unseen = config.prompts.table(), config.eval.unseen
    every = table + (unseen or ())
    check_component_prompts(config.reward, every.texts, every.metadata)
    judged = table if unseen is None else PromptTable.of(unseen)
    return Components(prior, reward, objective, describe_tools(config.eval, judged))


def check_posterior(prior: Described, given: Mapping[str, Any]) -> None:
    """Check `posterior:` of a config against its prior; nothing is loaded.

    Raises:
        ValueError: see `attach_arguments` and `ChecksPosterior`.
    """
    taken, target = attach_arguments(prior, given), prior.target
    if isinstance(target, type) and issubclass(target, ChecksPosterior):
        with naming(f"posterior of prior {prior.name!r}", target):
            prior.construct().check_posterior(**taken)


def describe_tools(config: EvalConfig, table: PromptTable) -> EvalTools:
    """Check what the section `eval:` names, and that its judges take the prompts.

    Raises:
        ValueError: see `describe_components`; of a judge the message names it.
    """
    judges = {}
    for judge in config.judges:
        name, given = judge_name(judge), {key: value for key, value in judge.model_dump().items() if key != "name"}
        with told_of(name):
            judges[name] = describe(given, "reward")
            check_component_prompts(given, table.texts, table.metadata)
    embedder = None if config.embedder is None else describe(config.embedder, "embedder")
    labeller = None if config.labeller is None else describe(config.labeller, "reward")
    return EvalTools(embedder, labeller, judges, tuple(describe(metric, "metric") for metric in config.metrics))


@contextmanager
def told_of(judge: str) -> Iterator[None]:
    """An error in the block is about this judge, says so, and says how to go on without it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"It is judge {judge!r} of the evaluation (eval.judges, --judges): mend it, or leave it out.")
        raise


def describe_prior(config: RunConfig) -> Described:
    """Check the name and the arguments of a config's prior, and tell it the run's prompts if it `ReadsPrompts`.

    Raises:
        ValueError: see `describe`; or the prior cannot draw one of the prompts.
    """
    prior = describe(config.prior, "prior")
    if isinstance(prior.target, type) and issubclass(prior.target, ReadsPrompts):
        table = config.prompts.table() + (config.eval.unseen or ())
        with naming(f"prior {prior.name!r}", prior.target):
            prior.construct().read_prompts(table.texts, table.metadata, Path(config.prompts.folder or "."))
    return prior


@contextmanager
def paths_explained(folder: Path) -> Iterator[None]:
    """Add to an error about a component where the run was started, if that was elsewhere: relative paths count from there."""
    try:
        yield
    except (ValueError, OSError) as error:
        there = last_directory(folder)
        if there is None or Path(there) == Path.cwd():
            raise
        raise ValueError(
            f"{error}\nThis run was last started in {there}, and relative paths and modules in its config count from the working "
            f"directory, which is {Path.cwd()}: give the command there."
        ) from error
