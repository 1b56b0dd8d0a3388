"""The tensors of a TorchScript archive, in which OpenAI published CLIP, without running the code that is in it.

`torch.jit.load` runs what a file brings along. The archive's tensors, however, lie as in any file that torch saved; only the
classes of its modules are its own. They are read as empty ones, by `torch.load(weights_only=True)`, which refuses all else.
"""

from __future__ import annotations

import io
import pickle
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

KEPT = ("data.pkl", "data/", "version", "byteorder", ".data/")
"""Of the archive: the tree of modules and its tensors; neither code nor constants."""

OWN = ("__torch__.", "torch.jit._pickle.")
"""Names that only TorchScript gives: classes of modules, and what marks the type of a list."""


def is_torchscript(path: Path | str) -> bool:
    """Whether a file is a TorchScript archive, by the names in it."""
    if not (Path(path).is_file() and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path | str) -> dict[str, Tensor]:
    """The tensors of the modules in an archive by name, on the CPU; what `torch.jit.load(path).state_dict()` holds, at least.

    Raises:
        ValueError: it holds something else that would have to be run; the message has the line that converts it.
    """
    try:
        plain = _without_code(path)
        found = torch.serialization.get_unsafe_globals_in_checkpoint(plain)
        plain.seek(0)
        own: list[Any] = [
            (_Module if name.startswith(OWN[0]) else _unread, name) for name in found if name.startswith(OWN)
        ]
        with torch.serialization.safe_globals(own):
            tree = torch.load(plain, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is a TorchScript archive, and not of tensors alone. {_remedy(path)}") from error
    return dict(_tensors(tree))


class _Module:
    """Stands for any class of the archive: attributes and nothing else."""


def _unread(*values: object) -> None:
    """Stands for lists of numbers and the like, which are not weights."""


def _without_code(path: Path | str) -> io.BytesIO:
    plain = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(plain, "w") as copy:
        for name in archive.namelist():
            if name.partition("/")[2].startswith(KEPT):
                copy.writestr(name, archive.read(name))
    plain.seek(0)
    return plain


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items() if isinstance(module, _Module) else ():
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")


def _remedy(path: Path | str) -> str:
    to = Path(path).with_name(f"{Path(path).stem}-state.pt")
    code = f"import torch; torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), {str(to)!r})"
    return (
        "Where you trust its author, for this runs the code in it, write its tensors to a file and give that: "
        f"python -c {shlex.quote(code)}"
    )
