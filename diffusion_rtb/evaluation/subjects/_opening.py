"""From what a command names to subjects: each kind is asked whether it knows a path, and the first that does opens it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from diffusion_rtb.evaluation import subjects
from diffusion_rtb.evaluation.subject import Options, Subject
from diffusion_rtb.evaluation.subjects.run import RunSubject

__all__ = ["kinds", "open_subjects"]


def kinds() -> list[type[Subject]]:
    """The classes on the shelf `subjects/`, by the names of their files."""
    names = [module.name for module in pkgutil.iter_modules(subjects.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{subjects.__name__}.{name}") for name in names]
    return [getattr(module, module.__all__[0]) for module in modules]


def open_subjects(paths: Sequence[Path], options: Options) -> list[Subject]:
    """Each path as a subject, checked, before anything of any of them is drawn; results of several go to OUT/NAME.

    Raises:
        ValueError: a path is named twice, is of no kind, or is refused by its kind; two would write into the same folder.
    """
    given = [Path(path).expanduser() for path in paths]
    twice = next((path for i, path in enumerate(given) if path.resolve() in {p.resolve() for p in given[:i]}), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: name each subject once.")
    found = [_opened(path, options) for path in given]
    if options.out is not None and len(found) > 1:
        for subject in found:
            subject.folder = options.out / subject.name
    folders = [subject.folder.resolve() for subject in found]
    same = next((s for s in found if folders.count(s.folder.resolve()) > 1), None)
    if same is not None:
        others = " and ".join(str(s.path) for s in found if s.folder.resolve() == same.folder.resolve())
        raise ValueError(
            f"{others} would both be written into {same.folder}: evaluate them one by one, each with its own --out."
        )
    return found


def _opened(path: Path, options: Options) -> Subject:
    # Of what nobody knows the run's errors say what is there instead, and how it becomes a run.
    kind = next((kind for kind in kinds() if kind.recognises(path)), RunSubject)

    return kind(path, options)
