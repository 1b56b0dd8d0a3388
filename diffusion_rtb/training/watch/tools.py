"""The judges and the embedder of `watch:`: described with everything else that a config names, loaded before the prior is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusion_rtb.config.components import Described, describe
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.section import Component, judge_name
from diffusion_rtb.evaluation.features import check_embedder
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.scoring.prompts import check_component_prompts, check_reward_prompts

__all__ = ["DescribedTools", "Tools", "describe_tools"]

REMEDY = "Mend it, or take it out of the section `watch`: a run that has begun goes on with another one"


@dataclass(frozen=True, eq=False)
class Tools:
    """What looks are judged by."""

    judges: Mapping[str, Reward]
    """By name."""
    embedder: Any = None
    """See `evaluation/features.py`; None: diversity is not measured."""


@dataclass(frozen=True)
class DescribedTools:
    """The same, not loaded yet."""

    judges: Mapping[str, Described]
    embedder: Described | None

    def build(self, config: RunConfig) -> Tools:
        """Load them, and show the prompts to the judges that ask for them.

        Raises:
            ValueError: one cannot be loaded, a package of it is missing, or it does not take a prompt; the message says which.
        """
        table = config.prompts.table()
        judges: dict[str, Any] = {}
        for name, described in self.judges.items():
            with _named(f"watch.judges: {name}"), doing("loading the judges"):
                judges[name] = described.build()
                check_reward_prompts(judges[name], table.texts, table.metadata, name)
        if self.embedder is None:
            return Tools(judges)
        with _named("watch.embedder"), doing("loading the embedder"):
            embedder = self.embedder.build()
            check_embedder(embedder, "watch.embedder")
        return Tools(judges, embedder)


def describe_tools(config: RunConfig) -> DescribedTools | None:
    """Check judges and embedder; nothing is loaded. None where the run is not watched.

    Warns where a judge is the reward itself, and where there is only one look besides that at the prior.

    Raises:
        ValueError: one does not exist, its arguments are wrong, what it needs is not installed, or it does not take a prompt.
    """
    watch = config.watch
    if watch is None:
        return None
    table = config.prompts.table()
    judges = {}
    for judge in watch.judges:
        name, component = judge_name(judge), _without_name(judge)
        with _named(f"watch.judges: {name}"):
            judges[name] = describe(component, "reward")
            check_component_prompts(component, table.texts, table.metadata)
    embedder = None
    if watch.embedder is not None:
        with _named("watch.embedder"):
            embedder = describe(watch.embedder, "embedder")
    _warn(config)
    return DescribedTools(judges, embedder)


def _without_name(judge: Component) -> dict[str, Any]:
    return {key: value for key, value in judge.model_dump().items() if key != "name"}


def _warn(config: RunConfig) -> None:
    watch = config.watch
    assert watch is not None
    for judge in watch.judges:
        if _without_name(judge) == config.reward.model_dump():
            warnings.warn(
                f"watch.judges: {judge_name(judge)} is the reward that is trained: it rises whatever samples become. A judge "
                "has to be held out: name another one.",
                stacklevel=2,
            )
    if watch.every > config.train.iterations:
        warnings.warn(
            f"watch.every is {watch.every}, and the run has {config.train.iterations} iterations: between the prior and the "
            "finished posterior there is no look, so no alarm before the end. Lower it.",
            stacklevel=2,
        )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say whose error it is, and what to do besides mending it."""
    try:
        yield
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: {said.rstrip('.')}. {REMEDY}.") from error
