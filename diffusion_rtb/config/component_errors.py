"""What errors about a component say besides: whose it is and from which line, and what was meant by a mistyped name."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = ["ComponentError", "naming", "nearest", "place"]

OWN = ("diffusion_rtb", "pipelines", "rewards")
"""Packages whose errors say already what they are about."""

_ROOT = Path(__file__).resolve().parents[2]
_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]


class ComponentError(RuntimeError):
    """What a config names did something that no component may do; the message names it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence " Did you mean ...?" naming the known name closest to `name`, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def naming(what: str, source: Any) -> Iterator[None]:
    """Add to an exception of the block that it came from `what`, and from which line; its kind and message stay as they are.

    Args:
        what: The component, e.g. "reward 'my_module:MyReward'".
        source: The class, or the name of the module that is imported. Refusals by this package's own need nothing added.

    Raises:
        ComponentError: the block tried to end the program, or raised StopIteration.
    """
    module = source if isinstance(source, str) else str(getattr(source, "__module__", ""))
    own = module.partition(".")[0] in OWN
    try:
        yield
    except SystemExit as error:
        raise ComponentError(
            f"{what} tried to end the program (SystemExit: {error.code}){_in(place(error))}. What a config names is imported: put "
            "what a script does below `if __name__ == '__main__':`."
        ) from error
    except StopIteration as error:
        # Generators turn it into another error on its way, and contextlib any RuntimeError that it is the cause of back into it.
        raise ComponentError(
            f"{what} raised StopIteration{_in(place(error))}: it asked for more than there was."
        ) from None
    except Exception as error:
        noted = any(note.startswith("It came from ") for note in getattr(error, "__notes__", ()))
        if not noted and not (own and isinstance(error, ValueError | OSError)):
            error.add_note(f"It came from {what}{_in(place(error))}.")
        raise


def place(error: BaseException) -> str | None:
    """FILE, line N of the code that is neither Python's, nor an installed library's, nor this package's; else of this package's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [(Path(f.filename).resolve(), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    frames = [(file, line) for file, line in frames if file.is_file() and not _installed(file)]
    foreign = [(file, line) for file, line in frames if not _ours(file)]
    if not frames:
        return None
    file, line = (foreign or frames)[-1]
    return f"{file.relative_to(_ROOT) if _ours(file) else file}, line {line}"


def _ours(file: Path) -> bool:
    return any(_ROOT / package in file.parents for package in OWN)


def _installed(file: Path) -> bool:
    """Libraries may lie below the folder of Python itself, and this package among the libraries."""
    return not _ours(file) and any(folder in file.parents for folder in _INSTALLED)


def _in(found: str | None) -> str:
    return f" ({found})" if found else ""
