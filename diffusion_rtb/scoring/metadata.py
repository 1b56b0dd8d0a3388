"""What a reward is told of each prompt. Torch is not needed.

A reward takes metadata when its call has a parameter `metadata`; a reward made of others says by an attribute `takes_metadata`
whether one of them does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from diffusion_rtb.abilities import says_metadata
from diffusion_rtb.config.prompts import Metadata

__all__ = ["call_reward", "takes_metadata"]

NAME = "metadata"


def takes_metadata(reward: Any) -> bool:
    """Whether a reward, or one inside it, is to be given the metadata of the prompts."""
    own = says_metadata(reward)
    return _parameter(reward) is not None if own is None else own


def call_reward(reward: Any, images: Any, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Any:
    """What a reward returns; one that takes metadata gets a copy of what is known of each prompt, empty where nothing is."""
    if not takes_metadata(reward):
        return reward(images, prompts)
    rows = [dict(deepcopy(row)) for row in metadata] if metadata is not None else [{} for _ in prompts]
    parameter = _parameter(reward)
    if parameter is not None and parameter.kind is parameter.POSITIONAL_ONLY:
        return reward(images, prompts, rows)
    return reward(images, prompts, metadata=rows)


def _parameter(reward: Any) -> inspect.Parameter | None:
    """The parameter of its call; a torch module's is that of `forward`."""
    for call in (reward, getattr(reward, "forward", None)):
        try:
            parameters = inspect.signature(call).parameters if callable(call) else {}
        except (TypeError, ValueError):  # a callable of another language
            continue
        if NAME in parameters:
            return parameters[NAME]
    return None
