"""From a name in a config to an object: `{component: NAME, argument: value, ...}`.

NAME is `module:attribute`, a file of the kind's folder (`clip_score` is the first public class of `rewards/clip_score.py`)
or a name that an installed package registered under the entry-point group `diffusion_rtb.<kind>s`. A new file is found
without being registered anywhere. The core imports no pipeline and no reward: only names lead to them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, update_wrapper
from importlib.metadata import entry_points
from pathlib import Path
from types import MethodType
from typing import Any

from pydantic import BaseModel

from diffusion_rtb.config.arguments import call_arguments
from diffusion_rtb.config.component_errors import naming, nearest
from diffusion_rtb.config.component_shape import Kind, check_origin, check_shape, handed_over, loads_weights

__all__ = [
    "Described",
    "Kind",
    "attach_arguments",
    "build",
    "call_arguments",
    "describe",
    "locate",
    "nearest",
    "short_names",
]


_SHELVES: Mapping[str, str] = {
    "prior": "pipelines",
    "reward": "rewards",
    "objective": "diffusion_rtb.objectives",
    "behaviour": "diffusion_rtb.behaviours",
    "metric": "diffusion_rtb.evaluation.metrics",
    "steering": "diffusion_rtb.steering",
    "embedder": "rewards.embedders",
}
"""The package in which components of a kind live; a reward that embeds is an embedder too."""


def locate(name: str, kind: Kind | None = None) -> Any:
    """The object that `name` stands for.

    Args:
        name: `module:attribute`, or with a `kind` also a short name.
        kind: What is wanted: "prior", "reward", "objective", "behaviour", "metric", "embedder" or "steering".

    Raises:
        ValueError: nothing has that name; the message lists what exists and the nearest of it.
    """
    if ":" in name:
        return _attribute(name)
    if kind is None:
        raise ValueError(f"{name!r} is not of the form 'module:attribute', e.g. 'rewards.clip_score:ClipScore'.")
    known = short_names(kind)
    path = known.get(name) or known.get(name.replace("-", "_"))
    if path is None:
        raise ValueError(
            f"There is no {kind} named {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}. "
            f"Your own goes by 'module:attribute', e.g. 'my_module:MyClass'."
        )
    return _attribute(path)


@dataclass(eq=False)
class Described:
    """A component whose name and arguments were checked. Objectives, metrics and classes in two phases are constructed already."""

    name: str
    kind: Kind
    target: Any
    arguments: Mapping[str, Any]
    _made: Any = None
    _whole: bool = False

    def construct(self) -> Any:
        """The object, its weights not loaded; a reward that is a function, or made already, is itself the object.

        Raises:
            ValueError: the constructor refuses an argument.
        """
        if self._made is None:
            with naming(f"{self.kind} {self.name!r}", self.target):
                self._made = self._call()
        return self._made

    def ahead(self) -> Any:
        """What can be asked before anything loads: the object, or the class of one that would load when it is constructed."""
        plain = not inspect.isclass(self.target) or self._made is not None or loads_weights(self.target)
        return self.construct() if plain else self.target

    def _call(self) -> Any:
        if inspect.isfunction(self.target):
            return update_wrapper(partial(self.target, **self.arguments), self.target)
        return self.target(**self.arguments) if inspect.isclass(self.target) else self.target

    def build(self) -> Any:
        """The object with its weights, the same one whenever it is asked for."""
        made = self.construct()
        if not self._whole and loads_weights(self.target):
            with naming(f"{self.kind} {self.name!r}", self.target):
                made.load_weights()
        self._whole = True
        return made


def describe(component: Mapping[str, Any] | BaseModel, kind: Kind) -> Described:
    """Check what a component config names and its arguments; no weights are loaded.

    A class that has `load_weights()` only checks and keeps its arguments when it is constructed, as objectives and metrics do:
    that is done here. Any other class may load whatever it likes in its constructor, which waits for `Described.build`.

    Args:
        component: `{component: NAME, argument: value, ...}`.
        kind: What it must be.

    Raises:
        ValueError: no such component; an argument that is unknown, missing, of the wrong type or refused by the constructor.
    """
    name = _name(component, kind)
    target = locate(name, kind)
    check_shape(name, kind, target)
    given = {key: value for key, value in _mapping(component).items() if key != "component"}
    found = Described(name, kind, target, _arguments(kind, name, target, given))
    if inspect.isclass(target) and (kind in ("objective", "metric") or loads_weights(target)):
        found.construct()
    return found


def _arguments(kind: Kind, name: str, target: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    what = f"{kind} {name!r}"
    if not inspect.isclass(target) and not inspect.isfunction(target):
        for key in given:
            raise ValueError(
                f"{what} is made already and takes no arguments, got {key!r}: name its class to give some."
            )
        return {}
    handed = list(inspect.signature(target).parameters)[: handed_over(kind)] if inspect.isfunction(target) else []
    return call_arguments(what, target, given, but=[*handed, "metadata"] if handed else ())


def attach_arguments(prior: Described, given: Mapping[str, Any]) -> dict[str, Any]:
    """`posterior:` of a config, the arguments of its prior's `attach`, checked; nothing is loaded.

    Raises:
        ValueError: see `call_arguments`.
    """
    attach = MethodType(prior.target.attach, prior.target)
    return call_arguments(f"posterior: attach of prior {prior.name!r}", attach, given, {"seed": 0})


def build(component: Mapping[str, Any] | BaseModel, kind: Kind) -> Any:
    """What a component config names, described and then built; see `describe`."""
    return describe(component, kind).build()


def _mapping(component: Mapping[str, Any] | BaseModel) -> Mapping[str, Any]:
    return component.model_dump() if isinstance(component, BaseModel) else component


def _name(component: Mapping[str, Any] | BaseModel, kind: Kind) -> str:
    found = _mapping(component)
    name = found.get("component") if isinstance(found, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"A {kind} is written `{{component: NAME, argument: value}}`, got {found!r}.")
    return name


def short_names(kind: Kind) -> dict[str, str]:
    """Short name -> `module:attribute` of every component of a kind, sorted; files are read, not imported."""
    if kind not in _SHELVES:
        raise ValueError(f"Unknown kind of component {kind!r}: use one of {', '.join(map(repr, _SHELVES))}.")
    group = "reward" if kind == "embedder" else kind
    found = {point.name: point.value for point in entry_points(group=f"diffusion_rtb.{group}s")}
    also = _files(_SHELVES["reward"], "embed") if kind == "embedder" else {}
    return dict(sorted((found | also | _files(_SHELVES[kind])).items()))


@lru_cache
def _files(package: str, method: str | None = None) -> dict[str, str]:
    """Of the files of a package whose class defines a method, if one is named."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    found: dict[str, str] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for module in pkgutil.iter_modules([folder]):
            if module.name.startswith("_"):  # a helper of others in its folder
                continue
            path = Path(folder, module.name, "__init__.py") if module.ispkg else Path(folder, f"{module.name}.py")
            attribute = _component(path, method)
            if attribute is not None:
                found[module.name] = f"{package}.{module.name}:{attribute}"
    return found


def _component(path: Path, method: str | None = None) -> str | None:
    """The first name in a file's `__all__` that is a class of it, one with this method if one is named, or None."""
    public: list[str] = []
    classes: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            if method is None or any(isinstance(n, ast.FunctionDef) and n.name == method for n in node.body):
                classes.add(node.name)
        elif isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            public = list(ast.literal_eval(node.value))
    return next((name for name in public if name in classes), None)


def _attribute(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    check_origin(path, module_name)
    try:
        with naming(f"component {path!r}", module_name):
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing third-party import inside the module is the module's own story: let it be told.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"Component {path!r}: there is no module {error.name!r}.{_beside(module_name)}") from None
    for part in attribute.split("."):
        if not part or not hasattr(found, part):
            names = [name for name in getattr(found, "__all__", vars(found)) if not name.startswith("_")]
            where = getattr(found, "__name__", module_name)
            raise ValueError(f"Component {path!r}: {where!r} has {names}, not {part!r}.{nearest(part, names)}")
        found = getattr(found, part)
    return found


def _beside(module_name: str) -> str:
    """What a mistyped module could have been; Python's path is the remedy for one's own file."""
    package = module_name.rpartition(".")[0]
    names = [path.partition(":")[0] for package in _SHELVES.values() for path in _files(package).values()]
    beside = [name for name in names if name.startswith(f"{package}.")] if package else names
    hint = nearest(module_name, beside)
    return hint or " A module of your own must lie in the working directory, on PYTHONPATH, or be installed."
