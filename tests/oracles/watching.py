"""Judges and an embedder for runs on vectors, whose answers are simple enough to be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["across", "broken", "first", "raised", "second"]


def first(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The first number of each vector."""
    return images[:, 0]


def second(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The negative second number of each vector."""
    return -images[:, 1]


def raised(images: Tensor) -> Tensor:
    """An embedding in which vectors are near each other where they are equal: (x, y, 1)."""
    return torch.cat([images, torch.ones(len(images), 1)], dim=1)


def across(images: Tensor) -> Tensor:
    """An embedding of what the first number of the prior in `behaving.py` says nothing about: (0.3 x - y, 1)."""
    return torch.stack([0.3 * images[:, 0] - images[:, 1], torch.ones(len(images))], dim=1)


def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A judge whose service is away."""
    raise ConnectionError("nobody answers")
