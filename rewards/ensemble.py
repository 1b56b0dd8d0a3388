"""Several judges of one thing, trusted where they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from rewards._nested import Nested, entry_name, inner_values

__all__ = ["Ensemble"]


class Ensemble(Nested):
    r"""r(x) = mean_i r_i(x) − k·std_i r_i(x), with std the population's over the n members.

    Against reward hacking: an image that exploits one judge's weakness makes the judges disagree. 0 is the plain mean;
    from k = sqrt(n − 1) on no image gets more than its harshest judge gives. The members must be in the same
    units: wrap them in `standardise` where they are not.
    Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", 2023, https://arxiv.org/abs/2310.02743, with
    the standard deviation where they have the variance, so that k has no unit.

    Args:
        rewards: At least two mappings `{component: NAME, argument: value}`, with `name` where a component occurs twice.
        k: Standard deviations taken off; at least 0.
    """

    def __init__(self, rewards: Sequence[Mapping[str, Any]], *, k: float = 1.0) -> None:
        super().__init__(rewards)
        if len(rewards) < 2:
            raise ValueError(
                f"An ensemble of {entry_name(rewards[0])!r} alone has nothing to disagree: name two or more."
            )
        if not 0 <= k < math.inf:
            raise ValueError(f"k is {k}: it must be finite and at least 0 (0 is the plain mean).")
        self.k = k

    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        members = self.rewards.items()
        values = torch.stack([inner_values(reward, images, prompts, name, metadata) for name, reward in members])
        mean = values.mean(0)
        if self.k == 0:
            return mean
        # Where all members agree the root of the variance has no derivative; 0 is the right one for a penalty's minimum.
        variance = (values - mean).square().mean(0)
        std = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
        return mean - self.k * std
