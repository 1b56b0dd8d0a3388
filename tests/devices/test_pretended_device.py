"""Everything on a device that is not the CPU: the tests are in `on_it/`, and run in a process of their own.

A back end of torch is registered for good: in this process it would be there for the tests that follow. While working on one:

    python -m pytest --noconftest tests/devices/on_it/commands.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch before 2.10 has no device made in Python",
)
def test_everything_runs_on_a_pretended_device() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # Without the conftest, whose checks of shapes take a third of the time and are made elsewhere.
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(HERE.glob("on_it/*.py")))]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
