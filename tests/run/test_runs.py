"""A run's folder belongs to one config, and says what it ran on."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.run.folder import RunFolderError, name_free_again, open_run, run_folder


def config(out: Path, **changes: Any) -> RunConfig:
    data = {
        "name": "mine",
        "out": str(out),
        "prior": {"component": "stable_diffusion"},
        "reward": {"component": "jpeg"},
        "beta": 1.0,
        "prompts": {"list": ["a", "b", "c", "d"]},
    }
    return RunConfig.model_validate(data | changes)


def made(run: RunConfig) -> Path:
    """The folder of a run that has done nothing yet."""
    assert open_run(run) is None
    return run_folder(run)


def test_a_new_run_gets_its_config_and_manifest(tmp_path: Path) -> None:
    run = config(tmp_path / "deep" / "runs")
    folder = made(run)
    assert folder == tmp_path / "deep" / "runs" / "mine"
    assert load_config(folder) == run
    (start,) = json.loads((folder / "manifest.json").read_text())["starts"]
    assert start["versions"]["torch"] == version("torch")
    lines = b"".join(b'{"prompt": "%c"}\n' % letter for letter in b"abcd")
    assert start["prompts"] == {"count": 4, "sha256": hashlib.sha256(lines).hexdigest(), "merged": 0}
    assert start["hardware"]["cpus"] >= 1
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "manifest.json"]


def test_the_same_config_reopens_its_run(tmp_path: Path) -> None:
    folder = made(config(tmp_path))
    (folder / "metrics.jsonl").write_text("{}\n")
    open_run(config(tmp_path))
    assert len(json.loads((folder / "manifest.json").read_text())["starts"]) == 2
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    folder = made(config(tmp_path))
    other = config(tmp_path, beta=2.0, reward={"component": "jpeg", "quality": 50})
    with pytest.raises(RunFolderError) as error:
        open_run(other)
    message = str(error.value)
    assert "beta: 1.0 there, 2.0 now" in message
    assert "reward.quality: None there, 50 now" in message
    assert "seed" not in message
    assert "Choose another name (name=...), or delete" in message
    assert load_config(folder) == config(tmp_path)


def test_a_run_may_be_given_more_iterations(tmp_path: Path) -> None:
    folder = made(config(tmp_path))
    open_run(config(tmp_path, train={"iterations": 500}))
    assert load_config(folder).train.iterations == 500


@pytest.mark.parametrize("text, expected", [(None, "is not a run's folder"), ("beta: [", "cannot read")])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, text: str | None, expected: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("irreplaceable")
    if text is not None:
        (folder / "config.yaml").write_text(text)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(RunFolderError, match=expected):
        open_run(config(tmp_path))
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(RunFolderError, match="is not a run's folder"):
        open_run(config(tmp_path))


@pytest.mark.parametrize(("trained", "left"), [((), False), (("metrics.jsonl",), True)])
def test_a_name_is_free_again_after_an_error_before_training(
    tmp_path: Path, trained: tuple[str, ...], left: bool
) -> None:
    def fail() -> None:
        folder = made(config(tmp_path))
        for name in trained:
            (folder / name).write_text("{}\n")
        raise ValueError("found too late")

    with pytest.raises(ValueError, match="too late"), name_free_again(config(tmp_path)):
        fail()
    assert run_folder(config(tmp_path)).exists() is left


def test_a_corrected_config_may_have_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(Path(__file__).parents[2] / "configs" / "gaussian.yaml")
    small = ["train.iterations=1", "train.group=8", "train.micro_batch=8", "objective.component=trust_pcl"]
    for length, code in ((3, 1), (5, 0)):
        with pytest.raises(SystemExit) as left:
            main(["train", source, *small, f"objective.length={length}"])
        assert left.value.code == code
    assert "length=3 does not divide" in capsys.readouterr().err


def test_a_run_that_was_there_before_stays(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    with pytest.raises(RunFolderError), name_free_again(config(tmp_path)):
        open_run(config(tmp_path, beta=2.0))
    assert load_config(run_folder(config(tmp_path))) == config(tmp_path)
