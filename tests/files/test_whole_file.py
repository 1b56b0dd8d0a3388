"""Files and folders appear whole or not at all, are readable under the umask, and leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_rtb.files.whole import (
    DiskError,
    check_writable,
    clear_unfinished,
    size_text,
    whole,
    whole_folder,
    write_text,
)
from diffusion_rtb.run.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_files_have_the_modes_of_the_umask(tmp_path: Path, umask: None) -> None:
    with whole(tmp_path / "a.safetensors") as file:
        save_file({"x": torch.ones(2)}, file)
    with whole_folder(tmp_path / "lora") as folder:
        save_file({"x": torch.ones(2)}, folder / "x.safetensors")
        (folder / "deep").mkdir()
        save_file({"x": torch.ones(2)}, folder / "deep" / "y.safetensors")
    save_checkpoint(tmp_path / "checkpoints", 1, {"a": {"x": torch.ones(2)}}, {}, keep=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o750}


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_is_exchanged_whole_and_keeps_what_is_somebodys_own(tmp_path: Path, linked: bool) -> None:
    place = tmp_path / "lora"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    for text in ("one", "two"):
        with whole_folder(place) as folder:
            (folder / "README.md").write_text(text)
        (place / "notes.txt").write_text("mine")
    with suppress(ValueError), whole_folder(place) as folder:
        (folder / "README.md").write_text("three")
        raise ValueError("stop")
    assert {path.name: path.read_text() for path in place.iterdir()} == {"README.md": "two", "notes.txt": "mine"}
    assert place.is_symlink() is linked
    assert {path.name for path in tmp_path.iterdir()} == {"lora"} | ({"elsewhere"} if linked else set())


def test_a_reader_never_finds_a_folder_incomplete(tmp_path: Path) -> None:
    files = [f"{i}.txt" for i in range(5)]

    def write(text: str) -> None:
        with whole_folder(tmp_path / "lora") as folder:
            for name in files:
                (folder / name).write_text(text)

    write("0")
    found: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            folder = os.open(tmp_path / "lora", os.O_RDONLY)
            names = os.listdir(folder)
            # Who opened the old folder may see it being deleted; the folder of that name never is. The open one keeps its inode.
            if os.fstat(folder).st_ino == (tmp_path / "lora").stat().st_ino:
                found.append(len(names))
            os.close(folder)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        write(str(i))
    done.set()
    reader.join()
    assert set(found) == {5}


KILLED = """
import itertools, os, pathlib, sys
from diffusion_rtb.files.whole import whole_folder, write_text
folder = pathlib.Path(sys.argv[1])
for i in itertools.count():
    with whole_folder(folder / "lora") as unfinished:
        for name in "abc":
            (unfinished / name).write_text(str(i))
    write_text(folder / "card.md", "x" * 5000)
    os.write(1, b"w")
"""


def test_kills_leave_a_whole_folder_and_what_the_next_start_clears(tmp_path: Path) -> None:
    for k in range(6):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1 + 3 * k)
            process.send_signal(signal.SIGKILL)
        texts = [(tmp_path / "lora" / name).read_text() for name in "abc"]
        assert len(set(texts)) == 1
        assert len((tmp_path / "card.md").read_text()) == 5000
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.md", "lora"]


def test_only_leftovers_are_cleared(tmp_path: Path) -> None:
    mine = [".gitignore", ".000010.png", ".env.local", "000010.png", ".lock", ".notes.12ab34cd"]
    for name in (*mine, ".000010.png.k3j9x_ab", ".config.yaml.4711", ".000020.png.0123abcd.writing"):
        (tmp_path / name).write_text("")
    for name in (".lora.0123abcd.writing", ".gone.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("")
    clear_unfinished(tmp_path)
    # A folder that had stepped aside for a new one which never came is back.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "gone"])
    clear_unfinished(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 kB"), (0, "0 kB"), (12_345, "13 kB"), (160_000, "0.2 MB"), (7_050_000_000, "7.0 GB")]
)
def test_sizes_are_never_rounded_to_nothing(size: int, text: str) -> None:
    assert size_text(size) == text


def in_the_way(folder: Path, kind: str) -> Path:
    place = folder / "eval"
    if kind == "file":
        place.write_text("")
    elif kind == "broken link":
        place.symlink_to(folder / "nowhere")
    elif kind == "folder for a file":
        (place / "metrics.json").mkdir(parents=True)
    else:
        (folder / "above").write_text("")
        place = folder / "above" / "eval"
    return place


@pytest.mark.parametrize("kind", ["file", "broken link", "folder for a file", "file above"])
def test_what_is_in_the_way_is_named_beforehand(tmp_path: Path, kind: str) -> None:
    place = in_the_way(tmp_path, kind)
    with pytest.raises(DiskError, match=re.escape(str(place))):
        check_writable(place, files=("metrics.json",))


def test_the_probe_leaves_no_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", needed=1000)
    assert list(tmp_path.iterdir()) == []


INSIDE = """
import pathlib, sys
from diffusion_rtb.files.whole import check_writable
from diffusion_rtb.run.metrics_file import append_row
from diffusion_rtb.files.whole import write_text
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
try:
    if what == "no room":
        (folder / "big").write_bytes(bytes(90_000))
        write_text(folder / "card.md", "x" * 50_000)
    elif what == "no room later":
        check_writable(folder, needed=10**6)
    elif what == "no row":
        (folder / "big").write_bytes(bytes(4096 * 24))
        (folder / "metrics.jsonl").touch()
        append_row(folder / "metrics.jsonl", 0, {"a" * 5000: 1.0})
    elif what == "no inodes":
        for i in range(100):
            write_text(folder / f"{i}.txt", "")
    else:
        check_writable(folder)
except OSError as error:
    sys.stdout.write(str(error))
assert not list(folder.glob(".*")), list(folder.glob(".*"))
"""


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        (
            "no room",
            "size=100k",
            r"card\.md was not written: no room: \d+ kB free there \(.*\)\. To go on, free some space",
        ),
        ("no room later", "size=100k", r"was not written: no room: about 1\.0 MB needed, 0\.1 MB free there"),
        ("no row", "size=100k", r"metrics\.jsonl was not written: no room"),
        ("no inodes", "size=1m,nr_inodes=20", r"\.txt was not written: the disk has no inodes left"),
        ("read-only", "size=100k,ro", r"was not written: .*Read-only"),
    ],
)
def test_a_real_disk_says_what_it_lacks(tmp_path: Path, what: str, options: str, said: str) -> None:
    inside = f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1" "$4"'
    probe = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs none "$1"', "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a small file system")
    command = ["unshare", "-Urm", "sh", "-c", inside, "sh", str(tmp_path), sys.executable, INSIDE, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout


def test_a_write_into_no_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"a\.txt was not written"):
        write_text(tmp_path / "none" / "a.txt", "")
