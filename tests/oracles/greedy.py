"""A prior that wants more memory than there is, and one that cannot be used: what a benchmark meets on a small card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.stable_diffusion import StableDiffusion

__all__ = ["Broken", "Greedy"]

MORE_THAN_THERE_IS = 2**50


class Greedy(StableDiffusion):
    """From two samples at once the allocator itself says no."""

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        if len(prompts) > 1:
            torch.empty(MORE_THAN_THERE_IS, device=self.device)
        return super().arguments(prompts)


class Broken(StableDiffusion):
    """It has no call."""

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        raise LookupError("no arguments")
