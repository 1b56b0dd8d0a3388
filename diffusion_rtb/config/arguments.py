"""Arguments from a config against the signature and the annotations of what they are for, before it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffusion_rtb.config.component_errors import nearest

__all__ = ["call_arguments", "defaults"]

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call_arguments(
    what: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    offered: Mapping[str, Any] | None = None,
    *,
    but: Collection[str] = (),
) -> dict[str, Any]:
    """What a class or a function is to be called with by name.

    Args:
        what: It, for the message.
        function: The class or the function.
        given: By the config.
        offered: Arguments that it gets where it has a parameter of that name and the config is silent.
        but: Parameters that are not the config's.

    Returns:
        Both, those of the config converted to the annotated types.

    Raises:
        ValueError: with every argument that is unknown, missing or of the wrong type.
    """
    parameters, hints = inspect.signature(function).parameters, _hints(function)
    rest = next((hints.get(key, Any) for key, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
    unpacked = _unpacked(rest)
    hints |= unpacked
    own = {key: p for key, p in parameters.items() if p.kind in NAMED and key not in but}
    named = [*own, *unpacked]
    taken = {key: value for key, value in (offered or {}).items() if key in named and key not in given}
    missing = [key for key, p in own.items() if p.default is p.empty and key not in {*given, *taken}]
    problems = [f"{what} needs {key!r}: add `{key}: ...` to it." for key in missing]
    for key, value in given.items():
        if key not in named and (rest is None or unpacked):
            known = f"It has: {', '.join(named) or 'none'}."
            problems.append(f"{what} has no argument {key!r}.{nearest(key, named)} {known}")
            continue
        try:
            taken[key] = _convert(f"{what}, argument {key!r}", value, hints.get(key, Any))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return taken


def defaults(target: type) -> dict[str, Any]:
    """The arguments of a class by name, those that it hands on to its bases too, each with its default; None for one without."""
    found: dict[str, Any] = {}
    for base in target.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values() if "__init__" in vars(base) else ()
        own = {p.name: None if p.default is p.empty else p.default for p in parameters if p.kind in NAMED}
        found = own | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters) and parameters:
            break
    found.pop("self", None)
    return found


def _unpacked(rest: Any) -> dict[str, Any]:
    """Names and types of `**settings: Unpack[Settings]`, a TypedDict all of whose keys may be left out (PEP 692)."""
    return get_type_hints(get_args(rest)[0], include_extras=True) if get_origin(rest) is Unpack else {}


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError):
        # Annotations that only a type checker can resolve: the names of the arguments are checked all the same.
        return {}


def _convert(what: str, value: Any, hint: Any) -> Any:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception as error:  # noqa: BLE001 — pydantic raises many kinds for annotations that describe no data
        del error
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(detail["msg"] for detail in error.errors()))
        raise ValueError(f"{what}: got {value!r} ({type(value).__name__}). {reasons}.") from None
