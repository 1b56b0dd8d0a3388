"""SIGTERM and Ctrl-C as a wish, not as an end; said again, as an end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignal", "Stopped"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 1.0
"""Seconds that the main thread has for leaving by KeyboardInterrupt before the process is ended from outside of it."""
CODE = 130
"""Of a process that was interrupted."""


class Stopped(BaseException):
    """A wish to stop is followed: what was begun is given up. No error, so that nothing that handles errors takes it for one."""


class StopSignal:
    """Inside the block the first SIGTERM or Ctrl-C sets `came`; one more ends the process.

    The end is a KeyboardInterrupt. Python raises it between two of its own instructions, which a process that waits in a
    collective, or in a reward's C code, does not come to: after a second it is ended from another thread, with exit code 130.

    Args:
        together: Seconds within which further signals count as the first one's echo: of several processes each gets one from the
            terminal and one from the launcher.
    """

    def __init__(self, together: float = 0.0) -> None:
        self.came = False
        self.together = together
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python handles signals in the main thread only
            self._left.clear()
            self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
            heard, self._told = os.pipe()
            os.set_blocking(self._told, False)
            # Written by the C part of Python's handler, which runs wherever the main thread is.
            self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(heard,), name="stop signal", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup)
        self._left.set()
        os.close(self._told)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.came:
            self.came, self._first = True, now
        elif now - self._first >= self.together:
            raise KeyboardInterrupt

    def _watch(self, heard: int) -> None:
        """End the process at a second signal that the main thread does not answer; returns when the block is left."""
        first: float | None = None
        with os.fdopen(heard, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                now = time.monotonic()
                if byte[0] not in SIGNALS:
                    continue
                if first is None:
                    first = now
                elif now - first >= self.together and not self._left.wait(PATIENCE):
                    os._exit(CODE)
