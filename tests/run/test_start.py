"""A run that starts from another run's posterior: whose it is, where that is said, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_rtb.config.load import RunConfig, config_text, load_config
from diffusion_rtb.run.checkpoint_reading import CheckpointError, read_latest
from diffusion_rtb.run.export import export_posterior
from diffusion_rtb.run.folder import RunFolderError
from diffusion_rtb.training.assemble import assemble, check_run, training

SMALL = ["prior.steps=4", "train.group=8", "train.micro_batch=8", "train.checkpoint_every=1", "train.grid_every=0"]


def config(out: Path, name: str, *overrides: str) -> RunConfig:
    own = [f"out={json.dumps(str(out))}", f"name={name}", "train.iterations=2"]
    return load_config("configs/gaussian.yaml", [*SMALL, *own, *overrides])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start")
    assemble(config(out, "first", "beta=0.5")).fit()
    return out / "first"


def test_a_run_begins_with_the_posterior_of_another_and_then_goes_on_from_itself(first: Path, tmp_path: Path) -> None:
    there = tmp_path / "moved"
    shutil.copytree(first, there)
    wanted = config(tmp_path, "second", f"start={json.dumps(str(there))}", "beta=1.0", "train.iterations=1")
    held = read_latest(there / "checkpoints")
    assert held is not None
    with training(wanted) as trainer:
        own = {name: p.detach().clone() for name, p in trainer.prior.parameters().items()}
        assert own.keys() == held.tensors["posterior"].keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in held.tensors["posterior"].items())
        assert any(tensor.abs().sum() > 0 for tensor in own.values())
        trainer.fit()
    # What was started from may go: the run has checkpoints of its own.
    shutil.rmtree(there)
    again = config(tmp_path, "second", f"start={json.dumps(str(there))}", "beta=1.0")
    with training(again) as trainer:
        trainer.fit()
        assert trainer.iteration == 2
        card = export_posterior(again, trainer.prior, trainer.folder, trainer.progress) / "README.md"
    starts = json.loads((tmp_path / "second" / "manifest.json").read_text())["starts"]
    told = starts[0]["start"]
    assert "start" not in starts[1]
    assert (told["run"], told["checkpoint"], told["beta"], told["iterations_done"]) == (str(there), "00000002", 0.5, 2)
    sums = json.loads((first / "checkpoints" / "00000002" / "manifest.json").read_text())["files"]
    assert told["posterior_sha256"] == sums["posterior.safetensors"]["sha256"]
    row = next(line for line in card.read_text().splitlines() if line.startswith("| started from |"))
    assert "posterior of first for beta 0.5, after 2 iterations" in row
    assert told["posterior_sha256"][:12] in row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["prior.mean=[0.0, 0.0]"],
            "cannot start from .*another prior or adapter:\n  .*mean.* in the checkpoint.* now\n",
        ),
        (["prior.steps=6"], "cannot start from .*\n(.*\n)*  .*steps: 4 in the checkpoint, 6 now"),
    ],
)
def test_another_prior_is_refused_by_name(first: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    wanted = config(tmp_path, "second", f"start={json.dumps(str(first))}", *changes)
    with pytest.raises(CheckpointError, match=message), training(wanted):
        pass
    assert not (tmp_path / "second").exists()  # the name is free again


def test_what_is_no_trained_run_is_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "manifest.json").write_text("{}")
    (tmp_path / "untrained" / "config.yaml").write_text(config_text(config(tmp_path, "untrained")))
    for path, message in (("nowhere", "start: .*nowhere"), ("untrained", "start: .*no complete checkpoint")):
        wanted = config(tmp_path, "second", f"start={json.dumps(str(tmp_path / path))}")
        with pytest.raises(ValueError, match=message):
            check_run(wanted, tmp_path / "second")


def test_another_start_is_another_run(first: Path, tmp_path: Path) -> None:
    assemble(config(tmp_path, "second", "train.iterations=1")).fit()
    with pytest.raises(RunFolderError, match=r"start: None there, '.*first' now"):
        assemble(config(tmp_path, "second", f"start={json.dumps(str(first))}"))
