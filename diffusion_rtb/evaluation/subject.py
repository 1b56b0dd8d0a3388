"""What is evaluated: something with samples of a posterior and, mostly, of a prior beside it.

A kind of subject is one file in `subjects/`: a class based on `Subject`, first in its `__all__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffusion_rtb.config.prompts import PromptTable
from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.samples import Scorer, Side, Tools
from diffusion_rtb.run.checks import EvalTools, told_of

__all__ = ["Loaded", "Options", "Subject", "folder_of", "load_tools"]


@dataclass(frozen=True)
class Options:
    """What the command says besides the subject."""

    overrides: Sequence[str] = ()
    """Of keys `eval.*`."""
    judges: Sequence[str] = ()
    """Held-out rewards instead of those of `eval.judges`, each a name or `{component: NAME, ...}`; one text may hold several."""
    checkpoint: str = "latest"
    """Of a run, see `open_trained_run`."""
    config: Path | None = None
    """Of what is no run: its prior, reward, prompts and section `eval:`."""
    reward: str | None = None
    """Of pictures, where no config has it."""
    against: Path | None = None
    """Pictures of the prior, for pictures."""
    out: Path | None = None
    """Where the results go; None: as the kind of subject has it."""

    @property
    def all_overrides(self) -> list[str]:
        """With the judges as one more."""
        return [*self.overrides, *([f"eval.judges=[{', '.join(self.judges)}]"] if self.judges else [])]


def _nothing(numbers: Mapping[str, Any], card: Mapping[str, Mapping[str, Any]]) -> None:
    return


@dataclass(frozen=True, eq=False)
class Loaded:
    """A subject that is ready to be measured."""

    posterior: Side
    prior: Side | None
    sampling: Mapping[str, Any]
    """Exactly how it is sampled, as plain JSON values."""
    finish: Callable[[Mapping[str, Any], Mapping[str, Mapping[str, Any]]], None] = _nothing
    """Told of all numbers, and of those for a model card, after they are written."""
    seconds: Callable[[], Mapping[str, float]] = field(default=dict)
    """Spent in each phase."""


class Subject(ABC):
    """Something to evaluate, opened and checked; nothing heavy is loaded before `load`."""

    kind: ClassVar[str]
    path: Path
    """As it was given."""
    folder: Path
    """Where the results go."""
    eval: EvalConfig
    tools: EvalTools
    table: PromptTable
    """The prompts that are evaluated, with their metadata."""
    beta: float
    """nats per unit of reward; NaN where nobody said it."""

    @abstractmethod
    def __init__(self, path: Path, options: Options) -> None: ...

    @staticmethod
    @abstractmethod
    def recognises(path: Path) -> bool:
        """Whether a path is of this kind, by what lies there."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables and titles."""

    @property
    @abstractmethod
    def recipe(self) -> str:
        """What it is, in one sentence without its full stop."""

    @property
    def seeds(self) -> Mapping[str, Any]:
        """Where the noise of a sample comes from."""
        return {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """Further keys of metrics.json."""
        return {}

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All that its samples depend on besides `eval`, as plain JSON values: hashes of weights and files, settings, seeds."""

    @abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """A block in which no other command writes there; what is in the way is said before anything is loaded.

        Raises:
            FolderInUseError: another one does.
            DiskError: results cannot be written.
        """

    @abstractmethod
    def load(self) -> Loaded:
        """Everything that takes time or memory."""


def folder_of(subject: Subject, options: Options) -> Path:
    """Where the results of what has no place of its own go: `--out`, or evaluations/NAME."""
    return options.out or Path("evaluations", subject.name)


def load_tools(described: EvalTools, config: EvalConfig, scorer: Scorer | None = None) -> Tools:
    """Everything that `eval:` names; before the prior is loaded, so that what is missing is known early."""
    judges = {}
    for name, judge in described.judges.items():
        with told_of(name):
            judges[name] = judge.build()
    embedder = None if described.embedder is None else described.embedder.build()
    labeller = embedder if described.labeller is None else described.labeller.build()
    tools = Tools(embedder, labeller, judges, scorer)
    tools.check(config)
    return tools
