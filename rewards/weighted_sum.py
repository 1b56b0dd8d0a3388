"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Reward
from diffusion_rtb.locate import build, check_component
from diffusion_rtb.rewarding import evaluate_reward

__all__ = ["WeightedSum"]


class WeightedSum:
    r"""r(x) = sum_i weight_i · r_i(x).

    `parts` holds the values r_i (batch,) of the last call by name, without their weights, so that they can be logged.

    Args:
        rewards: One mapping per reward: `component` and its arguments as anywhere in a config, besides `weight` (default 1;
            negative to punish) and `name` (default: the component's), e.g.
            `[{component: clip_score, weight: 10.0}, {component: jpeg, weight: 0.1, quality: 80}]`.
    """

    def __init__(self, rewards: Sequence[Mapping[str, Any]]) -> None:
        self.check(rewards)
        self.weights = {_name(entry): float(entry.get("weight", 1.0)) for entry in rewards}
        self.rewards: dict[str, Reward] = {_name(entry): build(_component(entry), "reward") for entry in rewards}
        self.parts: dict[str, Tensor] = {}

    @staticmethod
    def check(rewards: Sequence[Mapping[str, Any]]) -> None:
        """Refuse bad entries, and bad arguments of the rewards in them, before any reward is built; ValueError."""
        if not rewards:
            raise ValueError("rewards is empty: name at least one, e.g. [{component: jpeg, weight: 1.0}].")
        for entry in rewards:
            check_component(_component(entry), "reward")
            weight = entry.get("weight", 1.0)
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight)):
                raise ValueError(f"The weight of reward {_name(entry)!r} is {weight!r}: it must be a finite number.")
        names = [_name(entry) for entry in rewards]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"Two rewards are called {double!r}: add `name: ...` to tell them apart.")

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        self.parts = {name: evaluate_reward(reward, images, prompts, name) for name, reward in self.rewards.items()}
        return torch.stack([self.weights[name] * values for name, values in self.parts.items()]).sum(0)


def _component(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("weight", "name")}


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["component"])
