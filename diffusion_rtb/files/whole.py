"""Files and folders that appear whole or not at all: written beside their place under a hidden name, flushed, then renamed.

What a kill leaves behind has that hidden name, and `clear_unfinished` finds it by it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusion_rtb.files.disk import explained

__all__ = ["clear_unfinished", "flush", "usual_modes", "whole", "whole_folder", "write_json", "write_text"]

UNFINISHED = re.compile(
    r"\..+\.[0-9a-f]{8}\.(writing|old)"
    # as versions before 0.2 named them
    r"|\.\d{6}\.png\.\w{8}|\.side_by_side\.png\.\w{8}|\.[\w-]+\.(yaml|json|jsonl|safetensors|md|csv)\.\d+"
)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`; nothing is left of it after an error.

    Raises:
        DiskError: there is no room, or no way to write there; it names `path`.
    """
    unfinished = _beside(path, "writing")
    try:
        with explained(path):
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            unfinished.chmod(mode)  # safetensors' files and temporary ones are private, a result is not
            flush(unfinished)
            unfinished.replace(path)
            flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of the folder `path`; nothing is left of it after an error.

    Files of the old folder that the new one lacks come along: they are somebody's own. On Linux the two change places in one step.

    Raises:
        DiskError: there is no room, or no way to write there; it names `path`.
    """
    path = path.resolve()  # a link to a folder elsewhere stays a link
    unfinished, old = _beside(path, "writing"), _beside(path, "old")
    try:
        with explained(path):
            unfinished.mkdir()
            yield unfinished
            if path.is_dir():
                _bring_along(path, unfinished)
            usual_modes(unfinished)
            for file in (*unfinished.rglob("*"), unfinished):
                flush(file)
            if not _exchange(unfinished, path):
                if path.exists():
                    path.rename(old)
                unfinished.rename(path)
            flush(path.parent)
    finally:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write strict JSON, which has no NaN.

    Raises:
        ValueError: the content holds one.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def clear_unfinished(folder: Path) -> None:
    """Delete what killed writers left in `folder`; only whoever holds its lock may, as others may be writing.

    A folder that had made room for its successor when a kill came gets its place back.
    """
    for path in folder.glob(".*") if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name) is None:
            continue
        place = folder / path.name[1:].rsplit(".", 2)[0]
        with suppress(OSError):  # what cannot be deleted is in nobody's way
            if path.name.endswith(".old") and not place.exists():
                path.rename(place)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX opens folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_modes(folder: Path) -> None:
    """Let everybody read the files of `folder` whom the umask lets: safetensors writes them for their owner alone."""
    probe = _beside(folder / "mode", "writing")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def _bring_along(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if (new / path.name).exists() or UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> bool:
    """Let two existing paths change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
