"""Are the members of a built prior or objective what they will be taken for? Asked before training, not where they are needed.

Some are needed only hours later: what `fingerprint` says in the model card, `export` and `snippet` at the end. `interfaces.py` has
them all, the optional ones too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, get_args

import torch

from diffusion_rtb.abilities import (
    ChecksSteps,
    Entry,
    HasBaseModel,
    HasElsewhere,
    HasEntry,
    HasSnippet,
    ObjectiveTraits,
)
from diffusion_rtb.interfaces import WarmsUp

__all__ = ["check_attached", "check_objective_members", "check_prior_members"]

CALLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "arguments": (("prompts",), ()),
    "features": (("prompts",), ()),
    "decode": (("x_0",), ()),
    "parameters": ((), ()),
    "as_prior": ((), ()),
    "fingerprint": ((), ()),
    "export": (("folder", "card"), ()),
    "snippet": ((), ("prompt",)),
    "elsewhere": ((), ()),
}
"""Methods of a prior: what they get by position, and by name. The last two are optional. What `attach` gets is the config's."""

OPTIONAL: Mapping[str, type] = {"snippet": HasSnippet, "elsewhere": HasElsewhere}

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "adapter": (),
    "guidance": ("tilted_prior", "scale", "negative_prompt"),
    "sampler": ("scheduler", "steps", "eta"),
}
"""Sections of a fingerprint that the model card reads: each a mapping with these keys, None or absent; `sampler` may have any keys
where there is no `guidance`."""


def check_prior_members(prior: Any) -> None:
    """Refuse a prior whose methods cannot be called as they will be, or whose attributes are of another kind.

    Raises:
        ValueError: naming the member, what it is, and what it has to be.
    """
    what = f"The prior {type(prior).__name__}"
    for name, (positions, names) in CALLS.items():
        if isinstance(prior, OPTIONAL.get(name, object)):
            _check_call(what, name, getattr(prior, name, None), positions, names)
    dims = prior.dims
    if not (isinstance(dims, tuple) and dims and all(isinstance(n, int) and n > 0 for n in dims)):
        raise ValueError(
            f"{what}: dims is {dims!r}; it is the shape of one state, a tuple of whole numbers: (4, 8, 8)."
        )
    if not isinstance(prior.device, torch.device):
        raise ValueError(
            f"{what}: device is {prior.device!r}; it must be a torch.device: torch.device({prior.device!r})."
        )
    if isinstance(prior, HasEntry) and prior.entry not in (None, *get_args(Entry)):
        raise ValueError(f"{what}: entry is {prior.entry!r}; it is one of {get_args(Entry)}, None or absent.")
    if isinstance(prior, HasBaseModel) and not isinstance(prior.base_model, str):
        raise ValueError(
            f"{what}: base_model is {prior.base_model!r}; it is the text by which the model card calls the prior."
        )
    block = prior.as_prior()
    if not isinstance(block, AbstractContextManager):
        raise ValueError(f"{what}: as_prior returned a {type(block).__name__}; decorate it with @contextmanager.")
    _check_fingerprint(what, prior)


def check_attached(prior: Any, prompt: str) -> None:
    """Refuse a posterior without parameters, and what its model card could not be written from.

    Args:
        prior: With the posterior attached.
        prompt: Of the run, for the card.

    Raises:
        ValueError: naming the member, what it is, and what it has to be.
    """
    what = f"The prior {type(prior).__name__}"
    _check_fingerprint(what, prior)
    parameters = prior.parameters()
    if not isinstance(parameters, Mapping) or not parameters:
        raise ValueError(
            f"{what}: parameters() is {_shown(parameters)} after attach; it is a mapping of names to the posterior's parameters."
        )
    for name, parameter in parameters.items():
        if not isinstance(parameter, torch.nn.Parameter):
            raise ValueError(f"{what}: parameters()[{name!r}] is a {type(parameter).__name__}; it must be a Parameter.")
    texts = {"snippet": prior.snippet(prompt=prompt)} if isinstance(prior, HasSnippet) else {}
    texts |= {"elsewhere": prior.elsewhere()} if isinstance(prior, HasElsewhere) else {}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{what}: {name}(...) returned {_shown(text)}; it is a text for the model card.")


def check_objective_members(objective: Any) -> None:
    """Refuse an objective whose optional attributes are of another kind than they are taken for.

    Raises:
        ValueError: naming the attribute, what it is, and what it has to be.
    """
    what = f"The objective {type(objective).__name__}"
    ObjectiveTraits.of(objective)
    if isinstance(objective, WarmsUp):
        _check_call(what, "warm_up", objective.warm_up, ("terms", "beta", "noise"), ())
    if isinstance(objective, ChecksSteps):
        _check_call(what, "check_steps", objective.check_steps, ("steps",), ())


def _check_call(what: str, name: str, method: Any, positions: tuple[str, ...], names: tuple[str, ...]) -> None:
    if not callable(method):
        raise ValueError(f"{what}: {name} is {_shown(method)}; it is a method.")
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # written in another language
        return
    try:
        signature.bind(*positions, **dict.fromkeys(names))
    except TypeError as error:
        called = ", ".join([*positions, *(f"{key}=..." for key in names)])
        raise ValueError(f"{what}: {name} takes {signature} and is called as {name}({called}): {error}.") from None


def _check_fingerprint(what: str, prior: Any) -> None:
    found = prior.fingerprint()
    if not isinstance(found, Mapping):
        raise ValueError(f"{what}: fingerprint() is {_shown(found)}; it is a mapping of plain JSON values.")
    try:
        first, second = (json.dumps(each, sort_keys=True, allow_nan=False) for each in (found, prior.fingerprint()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: fingerprint() holds something else than plain JSON values, e.g. a tensor, a dtype or NaN ({error})."
        ) from None
    if first != second:
        raise ValueError(
            f"{what}: fingerprint() says something else at every call; a checkpoint is compared with it, so it must stay the same."
        )
    for key, needed in SECTIONS.items():
        section = found.get(key)
        if section is not None and not isinstance(section, Mapping):
            raise ValueError(
                f"{what}: fingerprint()[{key!r}] is {_shown(section)}; it is a mapping, None or absent: {{'kind': {section!r}}}."
            )
        lacking = [name for name in needed if section and found.get("guidance") and name not in section]
        if lacking:
            raise ValueError(
                f"{what}: fingerprint()[{key!r}] has no {', '.join(lacking)}; beside `guidance` the model card reads {needed}."
            )
    _check_numbers(what, found)


def _check_numbers(what: str, found: Mapping[str, Any]) -> None:
    """What the card formats as numbers and lists."""
    adapter, guidance = found.get("adapter") or {}, found.get("guidance") or {}
    if "rank" in adapter and not isinstance(adapter.get("alpha"), Real):
        raise ValueError(
            f"{what}: fingerprint()['adapter'] has a rank and alpha {adapter.get('alpha')!r}: a LoRA has a number."
        )
    modules = adapter.get("target_modules", [])
    if not (isinstance(modules, list | tuple) and all(isinstance(name, str) for name in modules)):
        raise ValueError(f"{what}: fingerprint()['adapter']['target_modules'] is {modules!r}; it is a list of names.")
    if guidance and not (isinstance(guidance["scale"], Real) and found.get("sampler")):
        raise ValueError(
            f"{what}: fingerprint()['guidance'] needs a number as scale, and a `sampler` beside it; got {dict(guidance)}."
        )


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"
