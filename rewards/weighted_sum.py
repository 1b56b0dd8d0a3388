"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from rewards._nested import Nested, entry_name, inner_values

__all__ = ["WeightedSum"]


class WeightedSum(Nested):
    r"""r(x) = sum_i weight_i · r_i(x).

    Args:
        rewards: One mapping per reward: `component` and its arguments as anywhere in a config, besides `weight` (default 1;
            negative to punish) and `name` (default: the component's), e.g.
            `[{component: clip_score, weight: 10.0}, {component: jpeg, weight: 0.1, quality: 80}]`.
    """

    def __init__(self, rewards: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(rewards, "weight")
        for entry in rewards:
            weight = entry.get("weight", 1.0)
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight)):
                raise ValueError(
                    f"The weight of reward {entry_name(entry)!r} is {weight!r}: it must be a finite number."
                )
        self.weights = {entry_name(entry): float(entry.get("weight", 1.0)) for entry in rewards}

    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        found = {name: inner_values(reward, images, prompts, name, metadata) for name, reward in self.rewards.items()}
        return torch.stack([self.weights[name] * values for name, values in found.items()]).sum(0)
