"""Files and folders that appear whole or not at all: written beside their place under a hidden name, flushed, then renamed.

What a kill leaves behind has that hidden name, and `clear_unfinished` finds it by it. What the disk refuses is said with the file,
what is missing and what to do.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = [
    "DiskError",
    "check_writable",
    "clear_unfinished",
    "explained",
    "flush",
    "reason_and_remedy",
    "size_text",
    "usual_modes",
    "whole",
    "whole_folder",
    "write_json",
    "write_text",
]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

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


class DiskError(OSError):
    """A file could not be written; the message names it, what is missing and what to do."""


@contextmanager
def explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's error about writing `path` into one that names it and the remedy.

    Args:
        path: What is being written.
        needed: Bytes, where they are known.
    """
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        reason, remedy = reason_and_remedy(error, path, needed)
        raise DiskError(f"{path} was not written: {reason}. To go on, {remedy}.") from error


def reason_and_remedy(error: Exception, path: Path, needed: int | None = None) -> tuple[str, str]:
    """What an error about writing `path` means, and what to do, as two parts of a sentence."""
    # safetensors reports the operating system's error as text: "... (os error 28)".
    found = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if code not in FULL:
        return f"{error}", "check that the folder is writable"
    place = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    room = f"{size_text(free)} free there" if needed is None else f"{_about(needed)}, {size_text(free)} free there"
    if code == errno.EFBIG:
        return (
            f"a file of this size is not allowed there: {room} ({error})",
            "raise the limit (ulimit -f) or free some space",
        )
    if code == errno.EDQUOT:
        return f"your quota on this disk is used up: {room} ({error})", "free some space of yours"
    if _files_left(place) == 0:
        return (
            f"the disk has no inodes left, so it holds no further file, whatever its size; {room} ({error})",
            "delete files that are not needed, many small ones rather than one large",
        )
    return f"no room: {room} ({error})", "free some space"


def check_writable(folder: Path, *, needed: int = 0, files: tuple[str, ...] = ()) -> None:
    """Find out now whether results can be written into `folder` later, which may have to be made then.

    Args:
        folder: Where they are going to be.
        needed: About how many bytes.
        files: Their names; a folder in the place of one is refused.

    Raises:
        DiskError: they cannot; the message says what is in the way.
    """
    if folder.is_symlink() and not folder.exists():
        raise DiskError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there: make that folder, or delete the link."
        )
    if folder.exists() and not folder.is_dir():
        raise DiskError(f"{folder} is a file, and a folder of that name is to be written: move it away.")
    for name in files:
        if (folder / name).is_dir():
            raise DiskError(f"{folder / name} is a folder, and a file of that name is to be written: move it away.")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with explained(folder, needed):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{secrets.token_hex(4)}.writing"
        try:
            with probe.open("wb") as file:
                if needed and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, needed)
        finally:
            probe.unlink(missing_ok=True)
            for place in missing:  # whatever is refused next leaves no empty folder behind
                place.rmdir()


def size_text(count: int) -> str:
    """Bytes as people read them; never a rounded 0."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= 0.1 * size:
            return f"{count / size:.1f} {unit}"
    return f"{-(-count // 1000)} kB"


def _about(needed: int) -> str:
    return f"about {size_text(needed)} needed"


def _files_left(place: Path) -> int | None:
    """Inodes that are free; None where the file system does not count them."""
    if not hasattr(os, "statvfs"):
        return None
    counted = os.statvfs(place)
    return counted.f_favail if counted.f_files else None
