"""EfficientNet weights under the names of their first PyTorch port, as published packages have them, under timm's names.

The port numbers blocks through (`_blocks.5`) and counts normalisations from 0 in the stem and the first expansion; timm
numbers blocks within stages (`blocks.2.1`) and normalisations from 1. The tensors are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["is_port", "timm_names"]

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
"""Inverted residual blocks."""

PLAIN = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
"""Blocks that do not expand: those of the first stage."""


def is_port(state: Mapping[str, Tensor]) -> bool:
    """Are these the port's names?"""
    return "_conv_stem.weight" in state


def timm_names(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """The tensors of the port by their names in timm's `network`; what is unknown keeps its name, for `fill` to refuse."""
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    return {_renamed(name, places, state): tensor for name, tensor in state.items()}


def _renamed(name: str, places: list[str], state: Mapping[str, Tensor]) -> str:
    head, _, rest = name.partition(".")
    if head != "_blocks":
        return f"{OUTSIDE[head]}.{rest}" if head in OUTSIDE else name
    number, layer, rest = rest.split(".", 2)
    names = EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else PLAIN
    if layer not in names or int(number) >= len(places):
        return name
    return f"{places[int(number)]}.{names[layer]}.{rest}"
