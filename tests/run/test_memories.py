"""What behaviours remember is written once, comes back bit by bit, and survives kills, lost files and older checkpoints."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import Tensor

from diffusion_rtb.run import checkpoint
from diffusion_rtb.run.checkpoint import CheckpointError, clear_leftovers, load_checkpoint, save_checkpoint
from diffusion_rtb.run.checkpoint_reading import read_latest
from diffusion_rtb.run.memories import SPARSE, Memories
from tests.oracles.behaving import differing, run


def group(first: int, last: int, row: int = 0) -> dict[str, Tensor]:
    """Records `first` to `last` of a prompt; what a record holds follows from its number."""
    numbers = torch.arange(first, last)
    records = torch.stack([torch.full_like(numbers, row), numbers], 1)
    x = numbers.float()[:, None].expand(-1, 3) / 7
    return {
        "records": records,
        "record.x": x,
        "record.reward": -numbers.double(),
        "timesteps": torch.tensor([9.0, 4.0]),
    }


def save(folder: Path, iteration: int, held: dict[str, Tensor], memories: Memories, keep: int = 2) -> Path:
    return save_checkpoint(folder, iteration, {"source-replay": held, "posterior": {}}, {}, keep, memories)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("memories/source-replay/*")}


def numbers_in(content: bytes) -> list[int]:
    return (-load(content)["record.reward"]).long().tolist()


def test_a_record_is_written_once_and_comes_back(tmp_path: Path) -> None:
    known: Memories = {}
    save(tmp_path, 10, group(0, 6), known)
    (first,) = files(tmp_path).values()
    path = save(tmp_path, 20, group(2, 9), known)
    new = [numbers_in(content) for name, content in sorted(files(tmp_path).items()) if content != first]
    assert new == [[6, 7, 8]]
    assert sum(map(len, files(tmp_path).values())) > sum(p.stat().st_size for p in path.glob("source-*"))
    assert differing(load_checkpoint(path)[0]["source-replay"], group(2, 9)) == []
    before = files(tmp_path)
    assert differing(load_checkpoint(save(tmp_path, 30, group(2, 9), known))[0]["source-replay"], group(2, 9)) == []
    assert files(tmp_path) == before, "nothing came: nothing is written"


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9), st.booleans()), min_size=1, max_size=12))
def test_whatever_comes_and_goes_every_kept_checkpoint_is_whole(
    steps: list[tuple[int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two prompts, the last 8 of each; the run is reopened now and then."""
    folder = tmp_path_factory.mktemp("run")
    known: Memories = {}
    added, expected = [0, 0], {}
    for iteration, (row, count, reopened) in enumerate(steps):
        added[row] += count
        parts = [group(max(0, n - 8), n, i) for i, n in enumerate(added)]
        held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"timesteps": torch.ones(2)}
        expected[save(folder, iteration, held, known)] = held
        for path in [path for path in expected if path.exists()]:
            assert differing(load_checkpoint(path)[0]["source-replay"], expected[path]) == []
        if reopened:
            clear_leftovers(folder)
            found = read_latest(folder)
            assert found is not None
            known = found.memories
        total = sum(len(numbers_in(content)) for content in files(folder).values())
        assert total <= (SPARSE + 1) * 16, "the disk holds a bounded number of records"


def test_a_lost_or_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known: Memories = {}
    older, newer = (save(tmp_path / "run", n, group(0, n), known) for n in (3, 6))
    name = next(name for name, content in files(tmp_path / "run").items() if numbers_in(content) == [3, 4, 5])
    for damage in ("missing", "damaged"):
        folder = shutil.copytree(tmp_path / "run", tmp_path / damage)
        file = folder / "memories" / "source-replay" / name
        content = file.read_bytes()
        file.unlink()
        if damage == "damaged":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{name} is {damage}"):
            load_checkpoint(folder / newer.name)
        with caplog.at_level(logging.WARNING):
            for memories in (True, False):
                found = read_latest(folder, memories=memories)
                assert found is not None
                assert (found.path.name, found.passed_over) == (older.name, (newer.name,))
        assert name in caplog.text


def test_files_that_no_checkpoint_refers_to_are_cleared(tmp_path: Path) -> None:
    known: Memories = {}
    for n in (2, 4, 6, 8, 10, 12):
        save(tmp_path, n, group(max(0, n - 4), n), known)
    assert sorted(number for content in files(tmp_path).values() for number in numbers_in(content)) == list(
        range(6, 12)
    )
    folder = tmp_path / "memories" / "source-replay"
    for left in ("00000099-0123456789abcdef.safetensors", ".00000099-01.safetensors.0123abcd.writing"):
        (folder / left).write_text("of a kill")  # between the memory's file and the checkpoint that was to refer to it
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files(tmp_path))
    assert not [path for path in folder.iterdir() if "00000099" in path.name]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Memories = {}
    older = save(tmp_path, 3, group(0, 3), known)
    before, there = dict(known), files(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 6, group(0, 6), known)
    assert (known, files(tmp_path)) == (before, there)
    assert differing(load_checkpoint(older)[0]["source-replay"], group(0, 3)) == []
    assert differing(load_checkpoint(save(tmp_path, 6, group(0, 6), known))[0]["source-replay"], group(0, 6)) == []


def test_a_run_writes_each_trajectory_once(tmp_path: Path) -> None:
    """Resumed twice, with a checkpoint after every iteration: as many records on the disk as were drawn, none twice."""
    for iterations in (2, 4):
        trainer = run(
            tmp_path,
            behaviours=[
                {"component": "prior_buffer", "share": 0.25, "capacity": 8},
                {"component": "replay", "share": 0.5},
            ],
            train={"iterations": iterations, "checkpoint_every": 1, "keep_checkpoints": 1},
        )
        trainer.fit()
    for name in ("replay", "prior"):
        tensors = trainer.sources[name][0].tensors()
        parts = [
            load_file(path)
            for path in sorted((trainer.folder / "checkpoints" / "memories" / f"source-{name}").iterdir())
        ]
        assert len(parts) == (4 if name == "replay" else 1)
        assert torch.equal(torch.cat([part["record.x"] for part in parts]), tensors["record.x"])
