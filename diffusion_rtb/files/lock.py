"""One writer per folder: a lock that dies with its process, so that a kill leaves nothing to clean up.

It is the operating system's (`flock` on FOLDER/.lock), not the file's: the file stays, says who holds or held the lock, and may be
copied or deleted with the folder. Where the file system has no such locks (some network ones), a warning says so once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from diffusion_rtb.files.whole import explained

__all__ = ["LOCK", "FolderInUseError", "folder_lock", "one_at_a_time"]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


LOCK = ".lock"
"""The file's name."""

log = logging.getLogger(__name__)

_held: set[tuple[int, int, str]] = set()
"""Process, thread and folder of the locks held: a holder may enter again."""

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class FolderInUseError(RuntimeError):
    """Another process, or another thread, writes into the folder; the message says which."""


@contextmanager
def folder_lock(folder: Path, use: bool = True) -> Iterator[None]:
    """Be the only one who writes into `folder`, which exists, inside the block.

    Args:
        folder: A run's, a comparison's.
        use: False: do nothing, as all processes of one run but the main one.

    Raises:
        FolderInUseError: somebody else is; nothing is waited for.
        DiskError: the lock's file cannot be written.
    """
    key = (os.getpid(), threading.get_ident(), os.path.realpath(folder))
    if not use or key in _held:
        yield
        return
    descriptor = _locked(folder)
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        os.close(descriptor)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for `folder`, which is made; without locks, `folder_lock` has to do."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path) -> int:
    """The lock's file, open: closing it, or the end of the process, sets the lock free."""
    path = folder / LOCK
    while True:
        with explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not emptied: it may be somebody's
        try:
            _take(descriptor, folder)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has deleted the folder or the file meanwhile: this lock protects nothing


def _take(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        _warn(folder, "this system has no flock")
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            _warn(folder, f"its file system has no locks: {error}")
            return
        raise FolderInUseError(
            f"{folder} is in use by {_holder(descriptor)}. Wait until that has ended, or stop it; another name (name=...) is "
            "another folder."
        ) from None


def _sign(descriptor: int) -> None:
    """Say who holds the lock; on a full disk it holds without a word."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv), "since": started}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        held = json.loads(os.read(descriptor, 1 << 16))
        return f"process {held['pid']} on {held['host']} since {held['since']}: {held['command']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _warn(folder: Path, reason: str) -> None:
    log.warning(
        "%s cannot be locked (%s): nothing keeps a second command from writing there at the same time. See to it yourself.",
        folder,
        reason,
    )
