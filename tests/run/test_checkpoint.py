"""Checkpoints are exact, atomic under SIGKILL and on a full disk, and refuse to be read when damaged."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.run.checkpoint import (
    CheckpointError,
    check_compatible,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parents[2]


def some_tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {"posterior": {"a.weight": torch.full((3, 2), value)}, "objective": {"log_z": torch.tensor(value)}}


def save(folder: Path, iteration: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, iteration, some_tensors(iteration), {"iteration": iteration}, keep)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_json_state_comes_back(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    tensors, loaded = load_checkpoint(save_checkpoint(folder, 1, {}, state, keep=1))
    assert loaded == state
    assert tensors == {}


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    group = {
        "half": torch.randn(5).to(torch.bfloat16),
        "odd floats": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(256).to(torch.uint8),
        "flags": torch.tensor([True, False]),
        "transposed": base.T,
        "one storage": base,
        "its second row": base[1],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 0, {"group": group, "nothing": {}}, {}, keep=1))
    assert loaded.keys() == {"group", "nothing"}
    assert loaded["group"].keys() == group.keys()
    for name, tensor in group.items():
        found = loaded["group"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if name == "half":  # NumPy has no bfloat16
            found, tensor = found.view(torch.int16), tensor.view(torch.int16)
        assert found.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"keep": 0}, ValueError, "keep is 0.*keep >= 1"),
        ({"iteration": -1}, ValueError, r"iteration is -1.*\[0, 10\^8\)"),
        ({"tensors": {"../up": {}}}, ValueError, r"'\.\./up' cannot be a file name"),
        ({"state": {"a": [{"b": torch.zeros(1)}]}}, TypeError, r"state\.a\[0\]\.b is a Tensor"),
        ({"state": {"a": {1: 2}}}, TypeError, r"state\.a has the key 1 of type int"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"iteration": 1, "tensors": {}, "state": {}, "keep": 1}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "run", **(arguments | change))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture_lists_every_difference() -> None:
    saved = {"unet": {"channels": [8, 16], "heads": 2}, "rank": 4, "guided": True}
    check_compatible(saved, {"guided": True, "rank": 4, "unet": {"heads": 2, "channels": (8, 16)}})
    with pytest.raises(CheckpointError) as caught:
        check_compatible(saved, {"unet": {"channels": (8, 32), "heads": 2}, "guided": True, "eta": 1.0})
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  unet.channels: [8, 16] in the checkpoint, [8, 32] now",
        "  rank: 4 in the checkpoint, absent now",
        "  eta: absent in the checkpoint, 1.0 now",
    ]
    check_compatible({}, {})
    with pytest.raises(CheckpointError, match="a: absent in the checkpoint, 1 now"):
        check_compatible({}, {"a": 1})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["posterior.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Any
) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    damage(newer / file)
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(newer)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    assert file in caplog.text
    assert load_checkpoint(older)[1] == {"iteration": 10}


def test_only_checkpoints_count_and_the_newest_stay(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "notes").mkdir()
    (tmp_path / ".writing-00000099").mkdir()
    (tmp_path / "00000098").touch()
    assert latest_checkpoint(tmp_path) is None
    for iteration in (0, 5, 100, 20):
        assert latest_checkpoint(tmp_path) != save(tmp_path, iteration)
    # 20 was written last, by a run that went back: what is newer than it is not removed for it.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000005", "00000020", "00000098", "00000100", "notes"]


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    first = save(tmp_path, 10)
    second = save_checkpoint(tmp_path, 10, some_tensors(7.0), {"second": True}, keep=2)
    assert first == second
    tensors, state = load_checkpoint(second)
    assert state == {"second": True}
    assert tensors["objective"]["log_z"] == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["00000010"]


def test_a_kill_while_replacing_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10).rename(tmp_path / ".replaced-00000010")  # where a kill between the two renames leaves it
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found)[1] == {"iteration": 10}
    save(tmp_path, 15, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000005", "00000010", "00000015"]


KILL_TEN_TIMES = """
import itertools, os, pathlib, random, signal, sys, time, torch
from diffusion_rtb.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
torch.set_num_threads(1)
folder, start, moments = pathlib.Path(sys.argv[1]), 0, random.Random(0)

def save_forever(pipe):
    for i in itertools.count(start):
        tensors = {name: {"x": torch.full((1 << 17,), float(i))} for name in ("posterior", "buffer")}
        save_checkpoint(folder, i, tensors, {"iteration": i}, keep=2)
        os.write(pipe, b"s")

interrupted = 0
for _ in range(10):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(writing)
    os.close(writing)
    saved = len(os.read(reading, 1))  # it is saving: now kill it somewhere
    time.sleep(moments.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    while more := os.read(reading, 4096):
        saved += len(more)
    os.close(reading)
    interrupted += any(folder.glob(".*"))
    tensors, state = load_checkpoint(latest_checkpoint(folder))
    # What had been reported as saved is there, and at most the save under way besides.
    assert state["iteration"] in (start + saved - 1, start + saved), (start, saved, state)
    for group in tensors.values():
        assert torch.equal(group["x"], torch.full((1 << 17,), float(state["iteration"])))
    start = state["iteration"]  # as a resumed run does: it may write the same iteration again
sys.stdout.write(str(interrupted))
"""


def test_sigkill_at_any_moment_leaves_a_consistent_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_TEN_TIMES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "the kills were meant to hit saves that were under way"
    save(tmp_path, 10**6)
    assert not list(tmp_path.glob(".*")), "leftovers of killed saves stay behind"


@pytest.fixture
def small_file_limit() -> Iterator[int]:
    """A real limit of the operating system on the size of a file; writing beyond it fails with EFBIG."""
    limit = 50_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the default would kill the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("big", ["tensors", "state"])
def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, small_file_limit: int, big: str) -> None:
    previous = save(tmp_path, 10, keep=1)
    tensors = {"posterior": {"x": torch.zeros(small_file_limit if big == "tensors" else 1)}}
    state = {"text": "x" * (4 * small_file_limit if big == "state" else 1)}
    with pytest.raises(CheckpointError, match=r"about 0\.2 MB needed.*00000010 is intact.*free some space"):
        save_checkpoint(tmp_path, 20, tensors, state, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [previous.name]
    assert load_checkpoint(previous)[1] == {"iteration": 10}


FILL_DISK = """
import sys, pathlib, torch
from diffusion_rtb.run.checkpoint import CheckpointError, load_checkpoint, latest_checkpoint, save_checkpoint
folder = pathlib.Path(sys.argv[1])
for i in range(1, 100):
    try:
        save_checkpoint(folder, i, {"buffer": {"x": torch.full((10_000,), float(i))}}, {"i": i}, keep=100)
    except CheckpointError as error:
        sys.stdout.write(str(error))
        break
path = latest_checkpoint(folder)
tensors, state = load_checkpoint(path)
assert state == {"i": i - 1} and bool((tensors["buffer"]["x"] == i - 1).all()), (i, state)
assert not list(folder.glob(".*"))
"""


def test_a_really_full_file_system_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    inside = 'mount -t tmpfs -o size=300k none "$1" && exec "$2" -c "$3" "$1"'
    probe = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=300k none "$1"', "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a small file system")
    command = ["unshare", "-Urm", "sh", "-c", inside, "sh", str(tmp_path), sys.executable, FILL_DISK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    needed, free = re.search(r"no room: about (\d+) kB needed, (\d+) kB free there", done.stdout).groups()  # type: ignore[union-attr]
    assert int(needed) > int(free)
    assert "00000006 is intact" in done.stdout


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(
        CheckpointError, match=r"was not written: .*there is no earlier checkpoint.*check that the folder"
    ):
        save(tmp_path / "run", 1)
