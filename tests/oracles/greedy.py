"""Priors that want more memory than there is, cannot be used, or do not end: what a benchmark has to bear."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.stable_diffusion import StableDiffusion

__all__ = ["Broken", "Greedy", "Slow"]

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


class Slow(StableDiffusion):
    """Its call does not come to an end."""

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        while True:
            time.sleep(0.01)
