"""What a reward is told of the prompts before training: all of them, with their metadata. Torch is not needed.

A reward that cannot judge every prompt has a method `check_prompts`:

    @staticmethod
    def check_prompts(prompts, metadata, text=None)    # with the constructor's arguments that it names: before anything loads
    def check_prompts(self, prompts, metadata)         # of the built reward: before the prior loads

It raises a ValueError where a prompt will not do. Rewards inside another one are asked in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel

from diffusion_rtb.abilities import ChecksPrompts, inner_rewards
from diffusion_rtb.config.components import locate
from diffusion_rtb.config.prompts import Metadata

__all__ = ["check_component_prompts", "check_reward_prompts"]


def check_component_prompts(
    component: Mapping[str, Any] | BaseModel, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> None:
    """Show all prompts to the static `check_prompts` of a reward and of those among its arguments; nothing is built.

    Raises:
        ValueError: one of them does not take a prompt.
    """
    entry = component.model_dump() if isinstance(component, BaseModel) else component
    target: Any = locate(entry["component"], "reward")
    if inspect.isclass(target) and isinstance(_check(target), staticmethod | classmethod):
        check: Callable[..., Any] = target.check_prompts  # type: ignore[attr-defined]
        named = inspect.signature(check).parameters
        given = {key: value for key, value in entry.items() if key in named}
        _asked(check, str(entry.get("name") or entry["component"]), prompts, metadata, given)
    for inner in _components(entry):
        check_component_prompts(inner, prompts, metadata)


def check_reward_prompts(reward: Any, prompts: Sequence[str], metadata: Sequence[Metadata], name: str = "") -> None:
    """Show all prompts to the method `check_prompts` of a built reward and of those in its mapping `rewards`.

    Raises:
        ValueError: one of them does not take a prompt.
    """
    name = name or type(reward).__name__
    if isinstance(reward, ChecksPrompts) and not isinstance(_check(type(reward)), staticmethod | classmethod):
        _asked(reward.check_prompts, name, prompts, metadata, {})
    for part, found in inner_rewards(reward).items():
        check_reward_prompts(found, prompts, metadata, part)


def _asked(
    check: Callable[..., Any],
    name: str,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    arguments: Mapping[str, Any],
) -> None:
    try:
        check(list(prompts), [dict(deepcopy(row)) for row in metadata], **arguments)
    except Exception as error:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"Reward {name!r} does not take the {len(prompts)} prompts: {told}") from error


def _check(kind: type) -> Any:
    return inspect.getattr_static(kind, "check_prompts", None)


def _components(value: Any) -> Iterator[Mapping[str, Any]]:
    """The components among the arguments of another one, at any depth; not those inside them."""
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        if isinstance(item, Mapping) and isinstance(item.get("component"), str):
            yield item
        else:
            yield from _components(item)
