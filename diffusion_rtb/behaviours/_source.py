"""What is asked of every behaviour, and what one gets that says nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from diffusion_rtb.sampling.batch import Batch

if TYPE_CHECKING:
    from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Kept", "Share", "Source"]

Share = Annotated[float, Field(ge=0, lt=1)]
"""Of each prompt's group."""


@dataclass(frozen=True)
class Kept:
    """How much a source remembers, for the arithmetic of memory and disk."""

    setting: str
    """The argument that bounds it."""
    count: int
    """Trajectories per prompt, at most."""
    last_state_only: bool = False
    """Of each only x_0, not all states and log-densities."""
    each_turn: int | None = None
    """Trajectories that one turn of a prompt adds; None: a prompt's are all there from its first turn on, or from a warm-up."""


@runtime_checkable
class Source(Protocol):
    """Draws `count` trajectories for each prompt row, and can be saved and resumed.

    A class that names it as its base sets `name` and `share`, writes `draw`, and whatever it does otherwise than here. Its settings
    are the annotated arguments of its constructor.

    What `draw` does is repeatable: called again in the same iteration, it answers the same. What a source is to remember of an
    iteration it is told by `settle`, which is not called for one that failed.
    """

    name: str
    """Of its batch: `NAME_share_reward` in the metrics, `source-NAME` in checkpoints; another for each source of a run."""
    share: float
    """Share of each prompt's group that it draws; 0: none. What the others leave is the posterior's own."""
    off_policy: bool = True
    """It draws others than the posterior's own trajectories, for which on-policy objectives are wrong."""
    density_unknown: str = ""
    """Why nobody knows the density that its trajectories were drawn with, and the remedy: then objectives with importance weights
    refuse. Empty: it comes as the trajectory's `log_behaviour`, or `log_prob` where these are the same."""
    drawn_together: int = 1
    """Trajectories of one prompt that one call of the pipeline has to draw."""
    judges_estimates: bool = False
    """It asks the reward about unfinished samples; rewards that learn of what they see refuse."""
    tilted: bool = False
    """Its states are those of the forward process from samples that come, nearly, from the posterior of the run's beta."""
    posterior_like: bool = False
    """Its trajectories are nearly the posterior's, for the run's beta: chosen from the prior's by exp(beta·r)."""
    ranked: bool = False
    """Its rewards are the order of the two samples of a pair and no more; these are pictures, which a prior `Encodes`."""
    needs_noise: bool = False
    """It asks for the density of steps, or for their noise: samplers without are refused."""
    remembers: str = ""
    """What to do about a memory that one of several processes would keep for itself. Empty: there is none."""

    seed: int
    """The run's, once `prepare` was called."""
    group: int
    """Trajectories per prompt, once `prepare` was called."""

    def prepare(self, seed: int, group: int) -> None:
        """Before training: the run's seed and its trajectories per prompt."""
        self.seed = seed
        self.group = group

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Before training, and before anything loads: ValueError where it has nothing for one of the run's prompts."""
        return

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """(len(rows)·count) trajectories, those of one row adjacent; whichever of log_q and log_p are known come with them."""

    def kept(self, own: int, drawn: int) -> Kept | None:
        """What it remembers where a prompt's group has `own` trajectories of the posterior and `drawn` of this; None: nothing."""
        return None

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """An iteration has succeeded on these trajectories, by `name`, the posterior's own as "posterior"; densities are known."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """The source's memory, for a checkpoint; empty if it has none. `run/memories.py` has the form that is written once."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        return
