"""Annotations as run-time checks, by jaxtyping and beartype, at a fraction of what jaxtyping's own decorator costs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, config

__all__ = ["decorated_by", "install"]

_with_shapes = functools.partial(jaxtyping.jaxtyped, typechecker=None)


def install(packages: list[str]) -> None:
    """Check every call of a function of `packages`, which must not be imported yet, against its annotations.

    jaxtyping's import hook decorates the functions with `jaxtyping.jaxtyped(typechecker=...)`, which binds the arguments and checks
    them twice, also where no shape is annotated. Here those without a shape are checked by beartype alone, the others once.
    """
    jaxtyping.jaxtyped = decorated_by  # type: ignore[assignment]
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def decorated_by(**_: object) -> Callable[[Any], Any]:
    """In the place of `jaxtyping.jaxtyped`, with its arguments."""
    return _checked


def _checked(decorated: Any) -> Any:
    if inspect.isclass(decorated):
        if is_dataclass(decorated) and not hasattr(decorated.__init__, "__wrapped__"):
            decorated.__init__ = _checked(decorated.__init__)  # type: ignore[method-assign]
        return decorated
    if isinstance(decorated, classmethod | staticmethod):
        return type(decorated)(_checked(decorated.__func__))
    if isinstance(decorated, property):
        accessors = (decorated.fget, decorated.fset, decorated.fdel)
        return property(*(each and _checked(each) for each in accessors))
    return _checked_function(decorated)


def _checked_function(function: Any) -> Any:
    texts = function.__annotations__
    types = {name: _resolved(text, function.__globals__) for name, text in texts.items()}
    function.__annotations__ = types
    checked = beartype(function)
    function.__annotations__ = texts  # for those that read them: what is known to the type checker alone is not `Any`
    if checked is function:
        return function
    checked.__annotations__ = texts
    if any(map(_has_shape, types.values())):
        checked = _with_shapes(checked)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (function if config.jaxtyping_disable else checked)(*arguments, **named)

    return call


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """The type; `Any` where it is imported for the type checker alone."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), names, include_extras=True)["it"]
    except NameError:
        return Any


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, list):
        return any(map(_has_shape, annotation))
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, get_args(annotation)))
