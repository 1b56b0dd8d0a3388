"""What the disk's errors mean: which file, what is missing, what to do; and whether a folder can be written to at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["DiskError", "check_writable", "explained", "reason_and_remedy", "size_text"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
