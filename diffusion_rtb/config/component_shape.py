"""Has what a config names the shape of its kind? Asked of the class or function itself, before anything is called or constructed.

A config is code: it names something to import and call. What cannot be a prior, a reward or an objective (`subprocess:Popen`,
`os:system`) is not even called; a module of somebody else's that is made for harm is no less harmful for it.
"""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

__all__ = ["Kind", "check_origin", "check_shape", "handed_over", "loads_weights"]

Kind = Literal["prior", "reward", "objective", "behaviour", "metric", "embedder", "steering"]

_METHODS: Mapping[Kind, tuple[str, ...]] = {
    "prior": ("arguments", "features", "decode", "attach", "parameters", "as_prior", "fingerprint", "export"),
    "objective": ("prepare", "__call__", "state_dict"),
    "metric": ("of", "row", "card"),
    "behaviour": ("prepare", "draw", "kept", "settle", "tensors", "load"),
    "steering": ("around",),
}
"""What a class of the kind must have; see `interfaces.py`. Rewards and embedders are asked for one of several below."""

_SAID: Mapping[Kind, str] = {
    "prior": "Prior in diffusion_rtb/interfaces.py",
    "objective": "Objective in diffusion_rtb/interfaces.py",
    "behaviour": "Source in diffusion_rtb.behaviours",
    "steering": "Method in diffusion_rtb.steering",
    "metric": "Metric in diffusion_rtb/evaluation/metric.py",
}

_INSTEAD: Mapping[Kind, tuple[str, ...]] = {"reward": ("embed", "classify"), "embedder": ("embed",)}
"""Methods of a class that is not called itself: what the evaluation embeds with or tells classes apart by, and is no reward."""

_TAKES: Mapping[Kind, tuple[str, ...]] = {"reward": ("images", "prompts"), "embedder": ("images",)}
"""What is called with these, and may be a function."""


def check_origin(name: str, module: str) -> None:
    """Refuse modules of Python itself: nothing in them is a component, and much in them acts when it is called.

    Args:
        name: The component, for the message.
        module: Dotted; it is looked for, not imported.

    Raises:
        ValueError: it is part of the standard library.
    """
    top = module.partition(".")[0]
    if top in sys.builtin_module_names or (top in sys.stdlib_module_names and _in_standard_library(top)):
        raise ValueError(
            f"Component {name!r}: {top!r} is a module of Python itself, which holds no components. If a module of "
            "your own is meant, give it another name."
        )


def _in_standard_library(top: str) -> bool:
    """Some names of the standard library are those of people's own files, such as `code`; then the path decides."""
    spec = PathFinder.find_spec(top)
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return spec is None or spec.origin in (None, "frozen") or library in Path(str(spec.origin)).resolve().parents


def check_shape(name: str, kind: Kind, target: Any) -> None:
    """Refuse what is not of a kind, by what can be seen without calling it.

    Args:
        name: As in the config, for the message.
        kind: What it must be.
        target: A class; of rewards also a function of (images, prompts), of embedders one of (images), or one made already.

    Raises:
        ValueError: naming what is missing and the remedy.
    """
    what = f"{kind} {name!r}"
    if inspect.ismodule(target):
        raise ValueError(f"{what} is a module: name a class in it, as in 'my_module:MyClass'.")
    if inspect.isclass(target) or inspect.isroutine(target):
        check_origin(name, target.__module__ or "builtins")
    if inspect.isclass(target):
        _check_class(what, kind, target)
    elif kind not in _TAKES:
        form = "a function" if inspect.isroutine(target) else f"an object of type {type(target).__name__}"
        raise ValueError(f"{what} is {form}: name the class itself, which is given the config's arguments.")
    elif kind == "embedder" and _has(type(target), "embed"):
        return
    elif not callable(target):
        raise ValueError(f"{what} is of type {type(target).__name__}: name a class or a function.")
    else:
        _check_call(what, kind, target, target)


def _check_class(what: str, kind: Kind, target: type) -> None:
    if isinstance(inspect.getattr_static(target, "check", None), staticmethod):
        raise ValueError(
            f"{what} has a static method check, which nothing calls any more: let the constructor raise its ValueErrors, and move "
            "what takes time from there to a method load_weights(self)."
        )
    if kind in _TAKES:
        _check_called_class(what, kind, target)
        return
    missing = [method for method in _METHODS[kind] if not _has(target, method)]
    if missing:
        raise ValueError(
            f"{what} is a class without {', '.join(missing)}: it is no {kind}. The class {_SAID[kind]} says what one has."
        )


def _check_called_class(what: str, kind: Kind, target: type) -> None:
    instead = any(_has(target, method) for method in _INSTEAD[kind])
    if kind == "embedder" and instead:  # a reward that embeds is called with prompts as well
        return
    if _has(target, "__call__"):
        _check_call(what, kind, target, _called(target), bound=False)
    elif not instead:
        method = "__call__(self, images, prompts)" if kind == "reward" else "embed(self, images)"
        raise ValueError(f"{what} is a class without {method}: it is no {kind}.")


def handed_over(kind: Kind) -> int:
    """How many of a function's arguments are not the config's: those that it is called with."""
    return len(_TAKES.get(kind, ()))


def loads_weights(target: Any) -> bool:
    """Whether a class is in two phases, `abilities.TwoPhase`: it has a `load_weights` that takes no arguments."""
    method = inspect.getattr_static(target, "load_weights", None) if inspect.isclass(target) else None
    return inspect.isfunction(method) and len(inspect.signature(method).parameters) == 1


def _has(target: type, method: str) -> bool:
    """Whether its objects have the method; a type itself can be called without its objects being callable."""
    found = inspect.getattr_static(target, method, None)
    if found is None or (method == "__call__" and not any("__call__" in vars(base) for base in target.__mro__)):
        return False
    # torch.nn.Module can be called and fails unless `forward` is there.
    return method != "__call__" or getattr(_called(target), "__name__", "") != "_forward_unimplemented"


def _called(target: type) -> Any:
    """The function behind a call of its objects; torch.nn.Module passes calls on to `forward`."""
    own = next(vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base))
    forwards = own.__module__ == "torch.nn.modules.module" if hasattr(own, "__module__") else False
    return inspect.getattr_static(target, "forward", own) if forwards else own


def _check_call(what: str, kind: Kind, target: Any, function: Any, *, bound: bool = True) -> None:
    """Images, and prompts of a reward, must find their place; `metadata` is handed over by name where it is asked for."""
    given = _TAKES[kind]
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        raise ValueError(
            f"{what} is of type {type(target).__name__}, whose arguments cannot be read: wrap it in a function "
            f"f({', '.join(given)})."
        ) from None
    places = [] if bound or isinstance(function, staticmethod) else ["self"]
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = names[len(places) + len(given) :]
    if not inspect.isfunction(target):
        names = [name for name in names if name == "metadata" and kind == "reward"]
    further = [name for name in names if name != "prompts"]  # an embedder has none
    try:
        # What a function takes besides is the config's to give, and checked with its other arguments.
        signature.bind(*places, *given, **dict.fromkeys([*further, *_keywords(signature, target)]))
    except TypeError:
        remedy = f"Give everything beside {' and '.join(given)} a default."
        if len(signature.parameters) < len(places) + len(given):
            remedy = f"If it makes one, call it in your module, `{kind} = make()`, and name `{kind}` here."
        if kind == "embedder" and len(signature.parameters) > len(places) + 1:
            remedy += " A reward embeds where its class has a method embed(self, images)."
        article = "an" if kind == "embedder" else "a"
        raise ValueError(
            f"{what} takes {signature}, and {article} {kind} is called with ({', '.join(given)}). {remedy}"
        ) from None


def _keywords(signature: inspect.Signature, target: Any) -> list[str]:
    if not inspect.isfunction(target):
        return []
    return [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
