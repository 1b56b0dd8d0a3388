"""The best checkpoint stays when others go, with what it refers to, and opens by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_rtb.run.best import BEST, Best, read_best, write_best
from diffusion_rtb.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from diffusion_rtb.run.posterior import open_trained_run
from tests.oracles.behaving import run


def best_of(iteration: int) -> Best:
    return Best(iteration, "elbo", {"watch/elbo": 1.5}, {"samples": 4})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("0*"))


def save(folder: Path, iteration: int, records: list[int]) -> None:
    """A checkpoint with a memory of records that are their own numbers."""
    memory = {
        "records": torch.tensor([[0, number] for number in records]),
        "record.value": torch.tensor([float(number) for number in records]),
    }
    save_checkpoint(folder, iteration, {"replay": memory}, {"iteration": iteration}, keep=2)


def test_the_best_stays_with_the_memories_it_refers_to(tmp_path: Path) -> None:
    save(tmp_path, 1, [0, 1])
    save(tmp_path, 2, [2, 3])
    write_best(tmp_path, best_of(2))
    for iteration in (3, 4, 5):
        save(tmp_path, iteration, [2 * iteration, 2 * iteration + 1])
    assert names(tmp_path) == ["00000002", "00000004", "00000005"]
    tensors, _ = load_checkpoint(tmp_path / "00000002")
    assert tensors["replay"]["record.value"].tolist() == [2.0, 3.0]
    write_best(tmp_path, best_of(5))
    save(tmp_path, 6, [12])
    assert names(tmp_path) == ["00000005", "00000006"], "what is no longer the best goes"
    assert len(list((tmp_path / "memories" / "replay").iterdir())) == 2


def test_what_is_the_best_comes_back_and_damage_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_best(tmp_path) is None
    write_best(tmp_path, best_of(7))
    assert read_best(tmp_path) == best_of(7)
    for damage in ('{"iteration": 7}', '{"iteration": 7, "pol', "[]"):
        (tmp_path / BEST).write_text(damage)
        assert read_best(tmp_path) is None
    assert caplog.text.count("no checkpoint is known to be the best") == 3


def test_a_run_opens_at_the_checkpoint_that_is_asked_for(tmp_path: Path) -> None:
    trainer = run(tmp_path, train={"checkpoint_every": 1})
    folder = trainer.folder / "checkpoints"
    saved = trainer.save

    def save() -> None:
        saved()
        if trainer.iteration == 1:
            write_best(folder, best_of(1))

    trainer.observers[-1]._save = save  # type: ignore[attr-defined]
    trainer.fit()
    assert names(folder) == ["00000001", "00000003", "00000004"]
    latest, best, third = (open_trained_run(trainer.folder, checkpoint=c) for c in ("latest", "best", "3"))
    assert [each.progress.done for each in (latest, best, third)] == [4, 1, 3]
    means = [torch.cat([t.flatten() for t in each.checkpoint.tensors["posterior"].values()]) for each in (latest, best)]
    assert not torch.equal(*means)
    assert "(the best by elbo): 1 of 4 iterations; beta" in best.progress.sentence
    assert "unfinished" not in best.progress.sentence + best.progress.iterations
    with pytest.raises(CheckpointError, match=r"no checkpoint 00000002\. Those kept: 00000004, 00000003, 00000001"):
        open_trained_run(trainer.folder, checkpoint="2")
    with pytest.raises(CheckpointError, match="no checkpoint 'finest': it is latest, best, or one of"):
        open_trained_run(trainer.folder, checkpoint="finest")
    (folder / BEST).unlink()
    with pytest.raises(CheckpointError, match="names no best checkpoint"):
        open_trained_run(trainer.folder, checkpoint="best")
