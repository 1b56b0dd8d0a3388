"""Are the members of a built prior or objective what they will be taken for? Asked before training, not where they are needed.

Some are needed only hours later: what `fingerprint` says in the model card, `export` and `snippet` at the end. `interfaces.py` has
them all, the optional ones too. What is wrong is a ValueError that names the member, what it is, and what it has to be.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, get_args

import torch
from torch.nn import Parameter

from diffusion_rtb.abilities import ChecksIterations, ChecksSteps, Entry, HasElsewhere, HasSnippet, ObjectiveTraits
from diffusion_rtb.interfaces import KeepsOld, WarmsUp

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
    """Refuse a prior whose methods cannot be called as they will be, or whose attributes are of another kind."""
    what = f"The prior {type(prior).__name__}"
    for name, (positions, names) in CALLS.items():
        if isinstance(prior, OPTIONAL.get(name, object)):
            _check_call(what, name, getattr(prior, name, None), positions, names)
    dims, device, block = prior.dims, prior.device, prior.as_prior()
    entry, base = getattr(prior, "entry", None), getattr(prior, "base_model", "")
    shape = isinstance(dims, tuple) and dims != () and all(isinstance(n, int) and n > 0 for n in dims)
    known = (None, *get_args(Entry))
    manager = isinstance(block, AbstractContextManager)
    _require(shape, what, f"dims is {dims!r}; it is the shape of one state, a tuple of whole numbers: (4, 8, 8)")
    _require(
        isinstance(device, torch.device),
        what,
        f"device is {device!r}; it must be a torch.device: torch.device({device!r})",
    )
    _require(entry in known, what, f"entry is {entry!r}; it is one of {known[1:]}, None or absent")
    _require(
        isinstance(base, str), what, f"base_model is {base!r}; it is the text by which the model card calls the prior"
    )
    _require(manager, what, f"as_prior returned a {type(block).__name__}; decorate it with @contextmanager")
    _check_fingerprint(what, prior)


def check_attached(prior: Any, prompt: str) -> None:
    """Refuse a posterior without parameters, and what its model card for `prompt` could not be written from."""
    what = f"The prior {type(prior).__name__}"
    _check_fingerprint(what, prior)
    found = prior.parameters()
    some = isinstance(found, Mapping) and len(found) > 0
    needed = "after attach; it is a mapping of names to the posterior's parameters"
    _require(some, what, f"parameters() is {_shown(found)} {needed}")
    for name, parameter in found.items():
        kind = type(parameter).__name__
        _require(isinstance(parameter, Parameter), what, f"parameters()[{name!r}] is a {kind}; it must be a Parameter")
    texts = {"snippet": prior.snippet(prompt=prompt)} if isinstance(prior, HasSnippet) else {}
    texts |= {"elsewhere": prior.elsewhere()} if isinstance(prior, HasElsewhere) else {}
    for name, text in texts.items():
        _require(isinstance(text, str), what, f"{name}(...) returned {_shown(text)}; it is a text for the model card")


def check_objective_members(objective: Any) -> None:
    """Refuse an objective whose optional attributes are of another kind than they are taken for."""
    what = f"The objective {type(objective).__name__}"
    traits = ObjectiveTraits.of(objective)
    if isinstance(objective, WarmsUp):
        _check_call(what, "warm_up", objective.warm_up, ("terms", "beta", "noise"), ())
    if isinstance(objective, ChecksSteps):
        _check_call(what, "check_steps", objective.check_steps, ("steps",), ())
    if isinstance(objective, ChecksIterations):
        _check_call(what, "check_iterations", objective.check_iterations, ("iterations",), ())
    unknown = sorted(set(traits.compares) - {"prior", "old"})
    _require(not unknown, what, f"compares names {unknown}; it is of 'prior' and 'old'")
    keeps = isinstance(objective, KeepsOld)
    _require(
        keeps or not traits.keeps_old, what, "it compares with an old posterior, or lets it draw, and has no keeps_old"
    )


def _require(sound: bool, what: str, wrong: str) -> None:
    if not sound:
        raise ValueError(f"{what}: {wrong}.")


def _check_call(what: str, name: str, method: Any, positions: tuple[str, ...], names: tuple[str, ...]) -> None:
    _require(callable(method), what, f"{name} is {_shown(method)}; it is a method")
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
    _require(
        isinstance(found, Mapping), what, f"fingerprint() is {_shown(found)}; it is a mapping of plain JSON values"
    )
    try:
        first, second = (json.dumps(each, sort_keys=True, allow_nan=False) for each in (found, prior.fingerprint()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: fingerprint() holds something else than plain JSON values, e.g. a tensor, a dtype or NaN ({error})."
        ) from None
    changing = (
        "fingerprint() says something else at every call; a checkpoint is compared with it, so it must stay the same"
    )
    _require(first == second, what, changing)
    for key, needed in SECTIONS.items():
        section, said = found.get(key), f"fingerprint()[{key!r}]"
        plain = section is None or isinstance(section, Mapping)
        _require(plain, what, f"{said} is {_shown(section)}; it is a mapping, None or absent: {{'kind': {section!r}}}")
        lacking = ", ".join(name for name in needed if section and found.get("guidance") and name not in section)
        _require(not lacking, what, f"{said} has no {lacking}; beside `guidance` the model card reads {needed}")
    _check_numbers(what, found)


def _check_numbers(what: str, found: Mapping[str, Any]) -> None:
    """What the card formats as numbers and lists."""
    adapter, guidance = found.get("adapter") or {}, found.get("guidance") or {}
    alpha, modules, said = adapter.get("alpha"), adapter.get("target_modules", []), "fingerprint()['adapter']"
    scaled = "rank" not in adapter or isinstance(alpha, Real)
    _require(scaled, what, f"{said} has a rank and alpha {alpha!r}: a LoRA has a number")
    listed = isinstance(modules, list | tuple) and all(isinstance(name, str) for name in modules)
    _require(listed, what, f"{said}['target_modules'] is {modules!r}; it is a list of names")
    guided = "fingerprint()['guidance'] needs a number as scale, and a `sampler` beside it"
    whole = not guidance or (isinstance(guidance["scale"], Real) and bool(found.get("sampler")))
    _require(whole, what, f"{guided}; got {dict(guidance)}")


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"
