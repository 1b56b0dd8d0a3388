"""One writer per folder: real processes, killed ones too; the holder is named; the processes of one run are no strangers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_rtb.files.lock import FolderInUseError, folder_lock

ROOT = Path(__file__).parents[2]

HOLD = """
import pathlib, sys, time
from diffusion_rtb.files.lock import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    sys.stdout.write("held\\n"), sys.stdout.flush()
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path/run."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(FolderInUseError) as refused, folder_lock(tmp_path / "run"):
        pass
    said = str(refused.value)
    assert f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()} since 2" in said
    assert "-c" in said
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(FolderInUseError), folder_lock(tmp_path / "link"):  # the same folder under another name
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with folder_lock(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / ".lock").read_text())
    assert held["pid"] == os.getpid()


def test_a_copy_of_a_locked_folder_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with folder_lock(tmp_path / "copy"):
        assert json.loads((tmp_path / "copy" / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_whose_file_was_deleted_protects_the_new_file(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / "run" / ".lock").unlink()
    with folder_lock(tmp_path / "run"), pytest.raises(FolderInUseError):
        in_thread(tmp_path / "run")


def test_whoever_holds_it_may_enter_again_and_other_threads_may_not(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        with folder_lock(tmp_path):
            pass
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
            in_thread(tmp_path)
    in_thread(tmp_path)


def test_other_processes_of_a_run_do_not_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with folder_lock(tmp_path / "run", use=False):
        pass


def in_thread(folder: Path) -> None:
    """Take the lock in another thread of this process; its error is raised here."""
    errors: list[BaseException] = []

    def take() -> None:
        try:
            with folder_lock(folder):
                pass
        except FolderInUseError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
