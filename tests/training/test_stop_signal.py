"""The first signal is a wish, the second an end: also for a process that is not in Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_rtb.training.stop_signal import StopSignal

ROOT = Path(__file__).parents[2]
HELD = """
import ctypes, sys
from diffusion_rtb.training.stop_signal import StopSignal
with StopSignal():
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    mutex = ctypes.create_string_buffer(256)
    while ctypes.CDLL(None).pthread_mutex_lock(mutex) == 0:  # the second lock never returns, whatever signals come
        pass
"""


def test_a_second_signal_is_an_interrupt() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_echo_is_no_second_wish() -> None:
    with StopSignal(together=30.0) as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.came


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    stop = StopSignal()
    for _ in range(2):
        with stop:
            assert signal.getsignal(signal.SIGTERM) == stop._stop
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(fd) == fd


def test_a_process_that_is_not_in_python_ends_all_the_same() -> None:
    process = subprocess.Popen([sys.executable, "-c", HELD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None, "one signal is a wish"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
