"""What a plug-in may have besides what its kind must have (`interfaces.py`): all of it optional, none of it needs torch.

Who wants to know what a plug-in can do asks here. Nothing else in the package reads an attribute with a default of a plug-in, so
that an author finds in these two files everything that is ever looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


__all__ = [
    "ChecksIterations",
    "ChecksPosterior",
    "ChecksPrompts",
    "ChecksSteps",
    "DecodesWithGradient",
    "Embedder",
    "Encodes",
    "Entry",
    "HasBaseModel",
    "HasElsewhere",
    "HasEntry",
    "HasSnippet",
    "KnowsNoise",
    "KnowsSampler",
    "Labeller",
    "LearnsValue",
    "LoadsLora",
    "MemoryTraits",
    "ObjectiveTraits",
    "ReadsPrompts",
    "SizedAhead",
    "TwoPhase",
    "inner_rewards",
    "says_metadata",
    "why_no_gradient",
]

Entry = Literal["latents", "noise", "step"]
"""How a pipeline gets to the first state; see `replay`."""


@runtime_checkable
class TwoPhase(Protocol):
    """A prior or a reward that is described before it is built. Inherit from it, or just have the method.

    Its constructor checks its arguments, raises a ValueError for what no annotation can exclude, and keeps them: that takes no
    time and happens for everything in a config before anything is loaded, and by `diffusion-rtb config`. What takes time waits
    for `load_weights`. A class without that method is constructed only when it is needed.
    """

    def load_weights(self) -> None:
        """Read files, fetch what is missing, start programs; called once. Nothing, unless it is overridden."""
        return


@dataclass(frozen=True)
class ObjectiveTraits:
    """What an objective says of itself, by attributes of these names; where it lacks one, the value here holds."""

    uses_kl: bool = False
    """It needs `Terms.kl`; one more network evaluation per step for the posterior's own trajectories."""
    estimates_every: int = 0
    """It needs `Terms.estimate` at x_T and then every so many steps; a call of prior, decoder and reward for each; 0: none."""
    on_policy_only: bool = False
    """Its gradient is wrong on trajectories of another chain, so other behaviours are refused."""
    importance_weighted: bool = False
    """It reads `Terms.log_behaviour`, so behaviours that select trajectories by their reward, whose density nobody knows, are
    refused."""
    clips_ratios: bool = False
    """It clips ratios to the chain that drew, so that an on-policy objective too bears several updates on the same trajectories."""
    bears_posterior: bool = False
    """On-policy as it is, it is right on trajectories of the posterior that it is to become (`Source.posterior_like`)."""
    bears_updates: bool = False
    """On-policy as it is, it has targets that hold for several updates on the same trajectories."""
    value_stays: bool = False
    """Its V is learned once, by the warm-up: for one beta and one reward, so that neither may change."""
    learns_samples: bool = False
    """It takes samples of the posterior as targets themselves, so a behaviour has to provide them, noised (`Source.tilted`)."""
    noises: bool = False
    """An objective of states: it learns from samples that are noised anew for each update, and not from the states they came by."""
    compares: tuple[str, ...] = ("prior",)
    """An objective of states: the networks whose means it reads (`States.means`), of "prior" and "old"."""
    reads_bounds: bool = False
    """An objective of states: its weights depend on `Samples.log_ratio`, against the network that it `compares` with; for one more
    call of the posterior per state."""
    pairs_states: bool = False
    """An objective of states that `noises` and compares samples of a prompt within a micro-batch; they get the same noise."""
    reads_order: bool = False
    """Of rewards it reads nothing but which of two is larger, so that pairs from a folder will do (`Source.ranked`)."""
    leaves_own: bool = False
    """An objective of states that learns nothing from the posterior's own samples."""
    draws_old: bool = False
    """Its samples are those of its old posterior (`KeepsOld`); what is logged is measured on others."""
    needs_gradient: bool = False
    """It needs the gradient of the reward in x_0, through the prior's decoder: rewards and priors without one are refused."""
    smallest_group: int = 1
    """Trajectories per prompt that it needs, 2 where it compares them."""
    warm_up_updates: int | None = None
    """Of an objective with `warm_up`: 0 for none, else how many; None where it does not say."""
    warm_up_states: Literal["recorded", "noised"] = "recorded"
    """Which states `warm_up` reads: where it noises them anew, `terms.x` has x_0 alone, (batch, 1, *dims)."""

    @property
    def keeps_old(self) -> bool:
        """It has an old posterior beside the one that it trains."""
        return self.draws_old or "old" in self.compares

    @classmethod
    def of(cls, objective: Any) -> ObjectiveTraits:
        """What this objective says.

        Raises:
            ValueError: an attribute is of another kind than it is taken for.
        """
        said: dict[str, Any] = {field.name: getattr(objective, field.name, field.default) for field in fields(cls)}
        for field in fields(cls):
            value, kind = said[field.name], "True, False" if isinstance(field.default, bool) else "a whole number"
            if isinstance(field.default, bool | int) and type(value) is not type(field.default):
                shown = f"{str(value)[:60]!r} ({type(value).__name__})"
                raise ValueError(
                    f"The objective {type(objective).__name__}: {field.name} is {shown}; it is {kind} or absent."
                )
        return cls(**said)


@runtime_checkable
class LearnsValue(Protocol):
    """An objective that learns the soft value V(x_t, t, prompt) of the prior's states."""

    value: Any
    """V: called with states, timesteps and the prompts' features, in reward units; None before `prepare`."""

    @property
    def learns_value(self) -> bool:
        """Whether it does, with its settings."""


@runtime_checkable
class ChecksSteps(Protocol):
    """An objective that does not go with every number of denoising steps."""

    def check_steps(self, steps: int) -> None:
        """Raise a ValueError for a number that it cannot use; asked before the prior is loaded where the config says the number."""


@runtime_checkable
class ChecksIterations(Protocol):
    """An objective that does not go with every number of iterations."""

    def check_iterations(self, iterations: int) -> None:
        """Raise a ValueError for a number that it cannot use; asked before anything is loaded."""


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that cannot judge every prompt."""

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Raise a ValueError where one of a run's prompts will not do; see `scoring/prompts.py` for when it is asked."""


@runtime_checkable
class ChecksPosterior(Protocol):
    """A prior some arguments of whose `attach` do not go together, or not with its model."""

    def check_posterior(self, **posterior: Any) -> None:
        """Raise a ValueError for arguments of `attach` that no annotation can refuse; asked before anything is loaded."""


@runtime_checkable
class Embedder(Protocol):
    """A reward, or another class, that `eval.embedder` may name: distances are measured between its vectors."""

    def embed(self, images: Tensor) -> Tensor:
        """Vectors (batch, dim) of images in [0, 1], finite, of any length."""


@runtime_checkable
class Labeller(Protocol):
    """A reward, or another class, that `eval.labeller` may name."""

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """log p(class | image), (batch, classes), nats."""


@dataclass(frozen=True)
class MemoryTraits:
    """What a reward with a memory (`scoring/memory.py`) says of itself; where it lacks an attribute, the value here holds."""

    wanted: int = 0
    """Samples of the prior to show it before training."""
    moves: bool = True
    """Its answers go on changing while training; it is then refused beside what keeps trajectories with the rewards of a day."""

    @classmethod
    def of(cls, reward: Any) -> MemoryTraits:
        """What this reward says."""
        return cls(int(getattr(reward, "wanted", cls.wanted)), bool(getattr(reward, "moves", cls.moves)))


def inner_rewards(reward: Any) -> Mapping[str, Any]:
    """The rewards that a reward is made of, by name: its mapping `rewards`; none for any other reward."""
    found = getattr(reward, "rewards", None)
    return found if isinstance(found, Mapping) else {}


def says_metadata(reward: Any) -> bool | None:
    """Whether a reward made of others is to be given the metadata of prompts: its `takes_metadata`; None where the call tells."""
    found = getattr(reward, "takes_metadata", None)
    return found if isinstance(found, bool) else None


def why_no_gradient(reward: Any) -> str | None:
    """Why a reward has no gradient in its images: its text `no_gradient`, "" where it has one; None where it does not say."""
    found = getattr(reward, "no_gradient", None)
    return found if isinstance(found, str) else None


@runtime_checkable
class DecodesWithGradient(Protocol):
    """A prior whose decoded samples can be differentiated, for objectives that follow the reward's gradient."""

    def decode_with_gradient(self, x_0: Tensor) -> Tensor:
        """What `decode` answers, with a graph to x_0 where gradients are on."""


@runtime_checkable
class Encodes(Protocol):
    """A prior that takes pictures for samples, for pairs from a folder."""

    def latents_of(self, images: Tensor) -> Tensor:
        """x_0, (batch, *dims), of images (batch, 3, height, width) in [0, 1]; ValueError: they are of another size than its own."""


@runtime_checkable
class HasEntry(Protocol):
    """A prior that says how `pipe` gets to a recorded first state, where that does not follow from its call."""

    @property
    def entry(self) -> Entry | None:
        """See `rollout.replay`; None: it follows from the call."""


@runtime_checkable
class KnowsSampler(Protocol):
    """A prior that says before its weights load which scheduler it draws with."""

    @property
    def known_sampler(self) -> Any:
        """The scheduler; None where the files that say it are not here yet."""


@runtime_checkable
class KnowsNoise(Protocol):
    """A prior that says, as soon as its files are here, whether its sampler draws noise."""

    @property
    def why_no_noise(self) -> str | None:
        """Why its transitions have no density, and how they get one; empty: they have one; None: not known yet."""


@runtime_checkable
class ReadsPrompts(Protocol):
    """A prior that reads more of a prompt than its text (a picture to start from), or does not take every prompt."""

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """All prompts of a run with what its prompt file says of them, told before `load_weights` and before any other call.

        Relative paths in the metadata count from `folder`. Raise a ValueError for what cannot be drawn: a prompt that will not do,
        a column or a file that is missing.
        """


@runtime_checkable
class HasBaseModel(Protocol):
    """A prior that the model card calls by another text than the component's name."""

    @property
    def base_model(self) -> str:
        """Such as a hub id."""


@runtime_checkable
class HasSnippet(Protocol):
    """A prior with code for its model card. Without it a LoRA's card has `load_lora_weights`, and any other that there is none."""

    def snippet(self, *, prompt: str) -> str:
        """Python that samples what `export` wrote."""


@runtime_checkable
class LoadsLora(Protocol):
    """A prior whose posterior may be a LoRA that another tool has made, for `eval.py`."""

    def load_lora(self, path: Path) -> None:
        """Take a file, or the one in a folder, for the posterior, in place of `attach`; ValueError: it does not fit."""


@runtime_checkable
class HasElsewhere(Protocol):
    """A prior whose `export` writes files for other programs too."""

    def elsewhere(self) -> str:
        """Markdown on them for the model card."""


@runtime_checkable
class SizedAhead(Protocol):
    """A prior whose files say how large it is before any of its weights is loaded; `diffusion-rtb doctor` asks."""

    dtype: str
    """What its networks are loaded in, a dtype of torch by name."""

    def weight_files(self) -> Mapping[str, Sequence[Path]]:
        """The safetensors files of each network; empty where they are not here yet."""

    def trained_numbers(self, **posterior: Any) -> int:
        """How many numbers `attach` with these arguments would make trainable, by the files' headers; 0 where they are not here."""
