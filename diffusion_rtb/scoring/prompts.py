"""What a reward is told of the prompts: the metadata of each, and all of them before training. Torch is not needed.

A reward takes metadata when its call has a parameter `metadata`; a reward made of others says by an attribute `takes_metadata`
whether one of them does. A reward that cannot judge every prompt has a method `check_prompts`:

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

from diffusion_rtb.config.components import locate
from diffusion_rtb.config.prompts import Metadata

__all__ = ["call_reward", "check_component_prompts", "check_reward_prompts", "takes_metadata"]

NAME = "metadata"


def takes_metadata(reward: Any) -> bool:
    """Whether a reward, or one inside it, is to be given the metadata of the prompts."""
    own = getattr(reward, "takes_metadata", None)
    return own if isinstance(own, bool) else _parameter(reward) is not None


def call_reward(reward: Any, images: Any, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Any:
    """What a reward returns; one that takes metadata gets a copy of what is known of each prompt, empty where nothing is."""
    if not takes_metadata(reward):
        return reward(images, prompts)
    rows = [dict(deepcopy(row)) for row in metadata] if metadata is not None else [{} for _ in prompts]
    parameter = _parameter(reward)
    if parameter is not None and parameter.kind is parameter.POSITIONAL_ONLY:
        return reward(images, prompts, rows)
    return reward(images, prompts, metadata=rows)


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
    own = getattr(reward, "check_prompts", None)
    if callable(own) and not isinstance(_check(type(reward)), staticmethod | classmethod):
        _asked(own, name, prompts, metadata, {})
    inner = getattr(reward, "rewards", None)
    for part, found in inner.items() if isinstance(inner, Mapping) else ():
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
