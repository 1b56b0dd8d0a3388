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

__all__ = ["Kind", "check_origin", "check_shape", "loads_weights"]

Kind = Literal["prior", "reward", "objective", "behaviour", "metric"]

_METHODS: Mapping[Kind, tuple[str, ...]] = {
    "prior": ("arguments", "features", "decode", "attach", "parameters", "as_prior", "fingerprint", "export"),
    "objective": ("prepare", "__call__", "state_dict"),
    "metric": ("of", "row", "card"),
    "behaviour": ("prepare", "draw", "kept", "settle", "tensors", "load"),
}
"""What a class of the kind must have; see `interfaces.py`. Rewards are asked for one of several below."""

_SAID: Mapping[Kind, str] = {
    "prior": "Prior in diffusion_rtb/interfaces.py",
    "objective": "Objective in diffusion_rtb/interfaces.py",
    "behaviour": "Source in diffusion_rtb.behaviours",
    "metric": "Metric in diffusion_rtb/evaluation/metric.py",
}

_REWARD_LIKE = ("embed", "classify")
"""Methods by which an embedder or a judge of the evaluation is known that is no reward itself."""


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
        target: A class; of rewards also a function of (images, prompts), or a reward that is made already.

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
    elif kind != "reward":
        form = "a function" if inspect.isroutine(target) else f"an object of type {type(target).__name__}"
        raise ValueError(f"{what} is {form}: name the class itself, which is given the config's arguments.")
    elif not callable(target):
        raise ValueError(f"{what} is of type {type(target).__name__}: name a class or a function.")
    else:
        _check_call(what, target, target)


def _check_class(what: str, kind: Kind, target: type) -> None:
    if isinstance(inspect.getattr_static(target, "check", None), staticmethod):
        raise ValueError(
            f"{what} has a static method check, which nothing calls any more: let the constructor raise its ValueErrors, and move "
            "what takes time from there to a method load_weights(self)."
        )
    if kind == "reward":
        if not _has(target, "__call__"):
            if not any(_has(target, method) for method in _REWARD_LIKE):
                raise ValueError(f"{what} is a class without __call__(self, images, prompts): it is no reward.")
            return
        _check_call(what, target, _called(target), bound=False)
        return
    missing = [method for method in _METHODS[kind] if not _has(target, method)]
    if missing:
        raise ValueError(
            f"{what} is a class without {', '.join(missing)}: it is no {kind}. The class {_SAID[kind]} says what one has."
        )


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


def _check_call(what: str, target: Any, function: Any, *, bound: bool = True) -> None:
    """Images and prompts must find their place; `metadata` is handed over by name where it is asked for."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        raise ValueError(
            f"{what} is of type {type(target).__name__}, whose arguments cannot be read: wrap it in a function f(images, prompts)."
        ) from None
    places = [] if bound or isinstance(function, staticmethod) else ["self"]
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][len(places) + 2 :]
    further = names if inspect.isfunction(target) else [name for name in names if name == "metadata"]
    try:
        # What a function takes besides is the config's to give, and checked with its other arguments.
        signature.bind(*places, "images", "prompts", **dict.fromkeys([*further, *_keywords(signature, target)]))
    except TypeError:
        remedy = "Give everything beside images and prompts a default."
        if len(signature.parameters) < len(places) + 2:
            remedy = "If it makes a reward, call it in your module, `reward = make()`, and name `reward` here."
        raise ValueError(f"{what} takes {signature}, and a reward is called with (images, prompts). {remedy}") from None


def _keywords(signature: inspect.Signature, target: Any) -> list[str]:
    if not inspect.isfunction(target):
        return []
    return [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
