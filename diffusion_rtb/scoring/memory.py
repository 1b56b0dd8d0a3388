"""What a reward remembers between iterations (a running mean, say): collected while training, saved in checkpoints.

A reward with a memory has the four methods of `StatefulReward`; a reward made of others shows them in a mapping `rewards`,
and the functions here find the memories inside it. A reward without either needs nothing. The names are not
`state_dict` and `load_state_dict`: a reward that is a `torch.nn.Module` would have its whole network in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from diffusion_rtb.abilities import MemoryTraits, inner_rewards

__all__ = [
    "Gather",
    "StatefulReward",
    "innermost",
    "load_reward",
    "moving_rewards",
    "observing",
    "reward_tensors",
    "stateful_rewards",
    "wanting_rewards",
]

Gather = Callable[[Tensor], Tensor]
"""(1, n) of this process -> (processes, n) of all of them."""


@runtime_checkable
class StatefulReward(Protocol):
    """A reward with a memory. Between `observe` and `settle` its calls are collected; outside they change nothing.

    What it may say besides is in `abilities.MemoryTraits`.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The settled memory, for a checkpoint; empty if there is none yet."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""

    def observe(self) -> None:
        """Collect from now on; what was collected and not settled is dropped."""

    def settle(self, gather: Gather | None) -> None:
        """Stop collecting and take the collected in, of all processes; drop it if `gather` is None."""


def stateful_rewards(reward: Any, path: str = "") -> dict[str, StatefulReward]:
    """The rewards with a memory, `reward` itself and those inside it, by their path ("fit/inner/"; "" is `reward`)."""
    found: dict[str, StatefulReward] = {path: reward} if isinstance(reward, StatefulReward) else {}
    for name, part in inner_rewards(reward).items():
        found |= stateful_rewards(part, f"{path}{name}/")
    return found


def wanting_rewards(reward: Any) -> dict[str, int]:
    """How many samples of the prior each reward with a memory still wants to be shown, by path; those that want some."""
    wanted = {path: MemoryTraits.of(part).wanted for path, part in stateful_rewards(reward).items()}
    return {path: count for path, count in wanted.items() if count > 0}


def moving_rewards(reward: Any) -> list[str]:
    """Names of the rewards with a memory whose answers go on changing while training."""
    return [type(part).__name__ for part in stateful_rewards(reward).values() if MemoryTraits.of(part).moves]


def innermost(paths: Collection[str]) -> list[str]:
    """Those of the paths that have no other of them inside."""
    return [path for path in paths if not any(other != path and other.startswith(path) for other in paths)]


def reward_tensors(reward: Any) -> dict[str, Tensor]:
    """The memories of a reward and of those inside it, for a checkpoint; empty for a reward without."""
    parts = stateful_rewards(reward).items()
    return {f"{path}{name}": tensor for path, part in parts for name, tensor in part.tensors().items()}


def load_reward(reward: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `reward_tensors` gave. ValueError: some of it belongs to no reward here; nothing is loaded then."""
    parts = stateful_rewards(reward)
    owners: dict[str, dict[str, Tensor]] = {path: {} for path in parts}
    for key, tensor in tensors.items():
        path = key[: key.rfind("/") + 1]
        if path not in owners:
            known = ", ".join(map(repr, parts)) or "none"
            raise ValueError(
                f"The checkpoint has a memory {key!r} that belongs to no reward of this run (those with one: {known}). "
                "Use the reward of the run it belongs to."
            )
        owners[path][key[len(path) :]] = tensor
    for path, part in parts.items():
        part.load(owners[path])


@contextmanager
def observing(reward: Any, gather: Gather = lambda row: row, only: Collection[str] | None = None) -> Iterator[None]:
    """Let running statistics learn from the rewards of this block; an exception leaves them as they were.

    Every process of a run opens and closes the block at the same place: `gather` may be a collective.

    Args:
        reward: Whose memories learn.
        gather: Collects over the processes.
        only: Paths of those that keep what they saw; None: all.
    """
    parts = stateful_rewards(reward)
    for part in parts.values():
        part.observe()
    try:
        yield
    except BaseException:
        for part in parts.values():
            part.settle(None)
        raise
    for path, part in parts.items():
        part.settle(gather if only is None or path in only else None)
