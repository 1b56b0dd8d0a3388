"""Who is told how a run goes, in which order; and the parts that a run is put back to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_rtb.run.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from diffusion_rtb.training.observers import Observer
from diffusion_rtb.training.state import load, snapshot
from tests.oracles.behaving import rows, run


class Noting(Observer):
    """Notes what it is told, beside what is on the disk by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[str, int, int, int]] = []

    def note(self, what: str, iteration: int) -> None:
        file, latest = self.folder / "metrics.jsonl", latest_checkpoint(self.folder / "checkpoints")
        logged = len(file.read_text().splitlines()) if file.exists() else 0
        self.told.append((what, iteration, logged, 0 if latest is None else int(latest.name)))

    def started(self, iteration: int) -> None:
        self.note("started", iteration)

    def before(self, iteration: int) -> None:
        self.note("before", iteration)

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        self.note("after", iteration)
        metrics["noted"] = len(self.told)

    def ended(self) -> None:
        self.note("ended", -1)


def test_a_row_is_on_the_disk_before_the_checkpoint_that_counts_it(tmp_path: Path) -> None:
    trainer = run(tmp_path, train={"iterations": 2, "checkpoint_every": 1})
    first, last = Noting(trainer.folder), Noting(trainer.folder)
    trainer.observers.insert(0, first)
    trainer.observers.insert(len(trainer.observers) - 1, last)  # before the checkpoints, after all others
    trainer.fit()
    assert first.told == [
        ("started", 0, 0, 0),
        ("before", 0, 0, 0),
        ("after", 0, 0, 0),
        ("before", 1, 1, 1),
        ("after", 1, 1, 1),
        ("ended", -1, 2, 2),
    ]
    assert [told for told in last.told if told[0] == "after"] == [("after", 0, 1, 0), ("after", 1, 2, 1)]
    assert [row["noted"] for row in rows(trainer)] == [3, 5], "what an observer adds is seen by those after it"


def test_observers_are_told_of_the_end_however_it_comes(tmp_path: Path) -> None:
    class Failing(Noting):
        def before(self, iteration: int) -> None:
            raise RuntimeError("no more")

    trainer = run(tmp_path)
    other, failing = Noting(trainer.folder), Failing(trainer.folder)
    trainer.observers[:0] = [other, failing]
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit()
    assert other.told[-1][0] == failing.told[-1][0] == "ended"


def test_every_part_is_put_back(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        objective={"component": "rtb", "log_z": "per_prompt"},
        beta={"value": 0.5, "kl_budget": {"nats": 1.0, "rate": 0.3}},
    )
    trainer.step()
    before = snapshot(trainer.parts)
    trainer.iteration = 1
    trainer.step()
    torch.rand(3)
    moved = snapshot(trainer.parts)
    load(trainer.parts, before)
    back = snapshot(trainer.parts)
    changed = set()
    for name in trainer.parts:
        assert back[name].values == before[name].values
        assert back[name].tensors.keys() == before[name].tensors.keys()
        assert all(torch.equal(back[name].tensors[key], tensor) for key, tensor in before[name].tensors.items())
        same = all(torch.equal(moved[name].tensors[key], tensor) for key, tensor in before[name].tensors.items())
        changed |= set() if same and moved[name].values == before[name].values else {name}
    assert changed == {"posterior", "objective", "optimizer", "rng", "beta"}


@pytest.mark.parametrize("lost", ["warmed", "reward"])
def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(lost: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, train={"iterations": 1})
    trainer.fit()
    tensors, state = load_checkpoint(trainer.folder / "checkpoints" / "00000001")
    old = (
        {name: group for name, group in tensors.items() if name != lost},
        {k: v for k, v in state.items() if k != lost},
    )
    save_checkpoint(trainer.folder / "checkpoints", 1, *old, keep=1)
    with pytest.raises(CheckpointError, match=f"has no '{lost}'.* written by another version"):
        run(tmp_path, train={"iterations": 2}).fit()
