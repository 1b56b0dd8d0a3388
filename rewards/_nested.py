"""Rewards made of rewards: how the inner ones are written in a config, checked, built and called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase, why_no_gradient
from diffusion_rtb.config.components import Described, describe
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.scoring.call import RewardError, evaluate_reward, output_problem
from diffusion_rtb.scoring.metadata import call_reward, takes_metadata

__all__ = ["Nested", "entry_name", "inner_values"]


def entry_name(entry: Mapping[str, Any]) -> str:
    """What an entry's reward is called: its `name`, else its component."""
    return str(entry.get("name") or entry["component"])


class Nested(TwoPhase):
    """A reward made of others.

    Args:
        rewards: `{component: NAME, argument: value, ...}` each, besides `name` and `settings`.
        *settings: Keys of an entry that are not for the reward itself, e.g. "weight".

    Raises:
        ValueError: no entries, two of one name, or bad arguments of a reward.
    """

    def __init__(self, rewards: Sequence[Mapping[str, Any]], *settings: str) -> None:
        if not rewards:
            raise ValueError("rewards is empty: name at least one, e.g. [{component: jpeg}].")
        described = [describe(_component(entry, settings), "reward") for entry in rewards]
        names = [entry_name(entry) for entry in rewards]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"Two rewards are called {double!r}: add `name: ...` to tell them apart.")
        self.inner: dict[str, Described] = dict(zip(names, described, strict=True))
        """The inner rewards by name, described."""

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """The inner rewards by name, built when they are first asked for."""
        return {name: described.build() for name, described in self.inner.items()}

    def load_weights(self) -> None:
        _ = self.rewards

    @property
    def takes_metadata(self) -> bool:
        """Whether an inner reward is to be given the metadata of the prompts."""
        return any(takes_metadata(reward) for reward in self.rewards.values())

    @property
    def no_gradient(self) -> str | None:
        """That of the first inner reward that has none; see `abilities.why_no_gradient`."""
        said = {name: why_no_gradient(described.ahead()) for name, described in self.inner.items()}
        lacking = next((f"{name!r} in it has none: {why}" for name, why in said.items() if why), None)
        return lacking if lacking or None in said.values() else ""


def inner_values(
    reward: Reward,
    images: Float[Tensor, "batch *dims"],
    prompts: Sequence[str],
    name: str,
    metadata: Sequence[Metadata] | None = None,
) -> Float[Tensor, " batch"]:
    """The values of an inner reward, checked as everywhere; differentiable where images ask for it and the reward allows it.

    Raises:
        RewardError: see `evaluate_reward`.
    """
    if not (torch.is_grad_enabled() and images.requires_grad):
        return evaluate_reward(reward, images, prompts, name, metadata=metadata)
    values = call_reward(reward, images, prompts, metadata)
    problem = output_problem(values, images, prompts)
    if problem:
        raise RewardError(f"Reward {name!r} {problem[1]}.")
    return values


def _component(entry: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", *settings)}
