"""A run is what its folder says: moved, copied, edited, damaged, interrupted and unfinished ones, through the commands."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffusion_rtb.cli.main import eval_main, main
from diffusion_rtb.config.changes import changes
from diffusion_rtb.config.load import load_config
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.whole import DiskError
from diffusion_rtb.run.folder import RunFolderError
from diffusion_rtb.run.memories import sha256
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.training.assemble import assemble

CONFIG = """
prior: {component: gaussian, mean: [1.0, -2.0], covariance: [[2.0, 0.6], [0.6, 0.5]], steps: 4}
reward: {component: density, density: {mean: [2.0, -1.0], precision: [[1.0, 0.3], [0.3, 2.0]]}}
beta: 1.5
prompts: {list: [""]}
train: {iterations: 4, prompts_per_iteration: 1, group: 8, micro_batch: 8, lr: 0.03, checkpoint_every: 2, grid_every: 0}
eval: {samples: 8, prior_samples: 8, batch: 8, bootstrap: 5}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of one's own with a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text(CONFIG)


def command(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    code = left.value.code or 0
    assert isinstance(code, int)
    return code


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations in one go."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "g.yaml").write_text(CONFIG)
    assemble(load_config(folder / "g.yaml", [f"out={folder}"])).fit()
    return folder / "g"


def test_a_moved_and_renamed_run_goes_on_where_it_lies(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    moved = tmp_path / "other disk" / "my run (copy)"  # no name that a config could have
    moved.parent.mkdir()
    shutil.move("runs/g", moved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("train", os.path.relpath(moved), "train.iterations=4") == 0
    assert rows(moved) == rows(whole)
    assert not list(Path.cwd().iterdir())
    assert not (tmp_path / "runs" / "g").exists()
    one, other = (load_file(folder / "checkpoints" / "00000004" / "posterior.safetensors") for folder in (moved, whole))
    assert all(one[name].equal(other[name]) for name in other)
    assert command("eval", str(moved)) == 0


def test_the_config_finds_a_moved_run_by_out_and_the_file_in_it_means_its_folder(tmp_path: Path, whole: Path) -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    shutil.move("runs/g", tmp_path / "larger-disk-g")
    (tmp_path / "larger").mkdir()
    shutil.move(tmp_path / "larger-disk-g", tmp_path / "larger" / "g")
    assert command("train", "g.yaml", "out=larger", "train.iterations=3") == 0
    assert command("train", "larger/g/config.yaml", "train.iterations=4") == 0
    assert rows(tmp_path / "larger" / "g") == rows(whole)


def test_a_name_given_with_a_folder_makes_another_run(tmp_path: Path) -> None:
    assert command("train", "g.yaml", "train.iterations=1") == 0
    assert command("train", "runs/g", "name=hot", "beta=3.0") == 0
    assert load_config("runs/hot").beta.value == 3.0
    assert len(rows(Path("runs/g"))) == 1


def test_a_component_that_is_not_found_from_here_says_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "g.yaml", "train.iterations=1") == 0
    text = Path("runs/g/config.yaml").read_text().replace("component: gaussian", "component: 'nowhere:Prior'")
    Path("runs/g/config.yaml").write_text(text)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert command("eval", "../runs/g") == 1
    said = capsys.readouterr().err
    assert f"last started in {tmp_path}" in said
    assert str(tmp_path / "sub") in said


def test_home_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    nested = [
        "out=~/r",
        "prior={component: x, path: ~/p}",
        "reward={component: cached, reward: {component: y, path: [~/a]}, file: ~/c}",
        "eval.embedder={component: z, folder: '~'}",
        "prompts.list=['~/stays']",
    ]
    shutil.copy("g.yaml", tmp_path / "home")
    config = load_config("~/g.yaml", nested)
    home = str(tmp_path / "home")
    assert config.out == f"{home}/r"
    assert config.prior.model_dump()["path"] == f"{home}/p"
    reward = config.reward.model_dump()
    assert (reward["reward"]["path"], reward["file"]) == ([f"{home}/a"], f"{home}/c")
    assert config.eval.embedder is not None
    assert config.eval.embedder.model_dump()["folder"] == home
    assert config.prompts.list == ("~/stays",)
    assert command("train", "g.yaml", "out=~/r", "train.iterations=1") == 0
    assert not Path("~").exists()
    assert command("eval", "~/r/g") == 0


@pytest.mark.parametrize("key", ["beta", "lr"])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_config_edited_in_the_folder_is_refused_with_both_values(
    key: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "g.yaml") == 0
    file = Path("runs/g/config.yaml")
    before, after = {"beta": ("beta: 1.5", "beta: 50.0"), "lr": ("  lr: 0.03", "  lr: 0.04")}[key]
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    metrics = rows(Path("runs/g"))
    assert command(name, "runs/g") == 1
    said = capsys.readouterr().err
    full = {"beta": "beta: 1.5 there, 50.0 now", "lr": "train.lr: 0.03 there, 0.04 now"}[key]
    assert full in said
    assert "name=" in said
    assert rows(Path("runs/g")) == metrics
    assert not Path("runs/g/eval").exists()
    assert command("sample", "runs/g") == 1
    # The config it was started with is still the right one, and puts the folder's right.
    assert command("train", "g.yaml") == 0
    assert command("eval", "runs/g") == 0


def test_what_changes_no_number_may_change(whole: Path) -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    free = ["checkpoint_every=3", "keep_checkpoints=1", "grid_every=2", "grid_samples=3"]
    assert command("train", "g.yaml", *(f"train.{one}" for one in free), "eval.samples=12") == 0
    assert rows(Path("runs/g")) == rows(whole)


def test_iterations_cannot_be_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml") == 0
    assert command("train", "runs/g", "train.iterations=1") == 1
    assert "train.iterations is 1" in capsys.readouterr().err
    assert load_config("runs/g").train.iterations == 4


def test_long_values_are_shown_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    long = [f"prior.mean={[1.0] * 30}", f"prior.mean={[1.0] * 29 + [2.0]}"]
    config, other = (load_config("g.yaml", [text]) for text in long)
    assert changes(config, other) == ["  prior.mean[29]: 1.0 there, 2.0 now"]
    texts = [load_config("g.yaml", [f"prior.path={'x' * 100}{end}"]) for end in ("old", "new")]
    (line,) = changes(*texts)
    assert "old' there" in line
    assert "new' now" in line
    assert len(line) < 160


def test_eval_of_a_config_names_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("eval", "g.yaml") == 1
    assert "train it with `python train.py g.yaml`" in capsys.readouterr().err
    assert command("train", "g.yaml", "train.iterations=1") == 0
    assert command("eval", "g.yaml") == 1
    assert "give runs/g" in capsys.readouterr().err


def damage(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "zeros":
        file.write_bytes(bytes(300))
    elif how == "garbage":
        file.write_bytes(b"\xff\xfe{[\x00")
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.index(b":", len(whole) // 2)])  # half of the lines may be a whole config


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *itertools.product(["config.yaml"], ["gone", "empty", "zeros", "garbage", "truncated"]),
        *itertools.product(["manifest.json", "metrics.jsonl"], ["gone", "zeros", "garbage", "truncated"]),
        *itertools.product(["trackers.json", ".lock"], ["empty", "garbage"]),
    ],
)
def test_damaged_small_files_are_mended_or_named(
    whole: Path, name: str, how: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    file = Path("runs/g", name)
    if not file.exists():
        file.write_text('{"wandb": "1234"}')
    damage(file, how)
    with caplog.at_level(logging.WARNING):
        code = command("train", "runs/g", "train.iterations=4")
    said = capsys.readouterr().err + caplog.text
    if name == "config.yaml" and how in ("garbage", "truncated"):
        assert code == 2
        assert str(file) in said
        assert f"delete {file}" in said
        file.unlink()
        code = command("train", "runs/g", "train.iterations=4")
    assert code == 0
    assert rows(Path("runs/g"))[-2:] == rows(whole)[-2:]
    assert load_config("runs/g").beta.value == 1.5
    if name in ("metrics.jsonl", "config.yaml") or (name == "manifest.json" and how != "gone"):
        assert name in said
    assert json.loads(Path("runs/g/manifest.json").read_text())["starts"]
    assert open_trained_run("runs/g").progress.done == 4


def test_missing_rows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert command("train", "g.yaml", "train.iterations=4") == 0
    file = Path("runs/g/metrics.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{damaged", lines[3], lines[3]]) + "\n")
    with caplog.at_level(logging.WARNING):
        assert command("train", "g.yaml", "train.iterations=5") == 0
    assert "no row of iterations 1–2" in caplog.text
    assert [row["iteration"] for row in rows(Path("runs/g"))] == [0, 3, 4]


@pytest.mark.parametrize("kept", [True, False])
def test_lost_checkpoints_are_not_trained_again_in_silence(kept: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml") == 0
    before = rows(Path("runs/g"))
    shutil.rmtree("runs/g/checkpoints")
    if kept:
        Path("runs/g/checkpoints").mkdir()
    assert command("train", "g.yaml") == 1
    said = capsys.readouterr().err
    assert "knows 4 iterations" in said
    assert "delete runs/g/metrics.jsonl" in said
    assert rows(Path("runs/g")) == before
    Path("runs/g/metrics.jsonl").unlink()
    assert command("train", "g.yaml") == 0
    assert rows(Path("runs/g")) == before


@pytest.mark.parametrize("name", ["posterior.safetensors", "state.json"])
def test_a_run_with_damaged_checkpoints_alone_keeps_its_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml") == 0
    before = rows(Path("runs/g"))
    for file in Path("runs/g/checkpoints").rglob(name):
        file.write_bytes(file.read_bytes()[:-1])
    assert command("train", "runs/g") == 1
    assert "delete runs/g/metrics.jsonl" in capsys.readouterr().err
    assert rows(Path("runs/g")) == before


def test_a_kill_before_the_first_checkpoint_starts_over_without_ado() -> None:
    assert command("train", "g.yaml") == 0
    before = rows(Path("runs/g"))
    shutil.rmtree("runs/g/checkpoints")
    file = Path("runs/g/metrics.jsonl")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:2]) + '{"itera')
    assert command("train", "g.yaml") == 0
    assert rows(Path("runs/g")) == before


@pytest.mark.parametrize("key", ["prior", "config", "iteration", "beta", "optimizer"])
def test_a_state_without_a_key_is_named(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml", "beta={value: 1.5, kl_budget: {nats: 0.5}}", "train.keep_checkpoints=1") == 0
    (checkpoint,) = Path("runs/g/checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    del state[key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint, "state.json")
    assert command("train", "runs/g", "train.iterations=6") == 1
    said = capsys.readouterr().err
    assert "state.json" in said
    assert repr(key) in said


def test_a_damaged_file_with_the_right_hash_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml", "train.keep_checkpoints=1") == 0
    (checkpoint,) = Path("runs/g/checkpoints").iterdir()
    weights = checkpoint / "posterior.safetensors"
    weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])
    reseal(checkpoint, weights.name)
    for name in ("train", "eval", "sample"):
        assert command(name, "runs/g") == 1
        assert str(weights) in capsys.readouterr().err


def reseal(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / name
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes())}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def card(folder: Path) -> str:
    return (folder / "lora" / "README.md").read_text()


def test_an_unfinished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command("train", "g.yaml", "beta={value: 1.5, anneal: {start: 0.1, iterations: 100}}", "train.iterations=3")
        == 0
    )
    last = rows(Path("runs/g"))[-1]["beta"]
    file = Path("runs/g/config.yaml")
    assert "iterations: 3" in file.read_text()
    file.write_text(file.read_text().replace("iterations: 3\n", "iterations: 50\n"))
    assert f"beta = {last:.6g} nats" in card(Path("runs/g"))
    numbers = evaluate_run(Path("runs/g"))
    expected = {"iterations_done": 3, "iterations_asked": 50, "checkpoint": "00000003", "beta": last}
    assert numbers["run"] == expected | {"damaged_checkpoints_passed_over": [], "watch_embedder": None}
    assert json.loads(Path("runs/g/eval/metrics.json").read_text())["run"] == numbers["run"]
    assert numbers["beta"] == last
    assert "3 of 50 iterations - the run is unfinished" in capsys.readouterr().err
    text = card(Path("runs/g"))
    assert f"beta = {last:.6g} nats" in text
    assert "| iterations | 3 of 50 (unfinished) |" in text
    assert f"{last:.6g}, annealed towards 1.5 |" in text


def test_the_beta_of_a_budget_is_the_one_it_found() -> None:
    assert command("train", "g.yaml", "beta={value: 1.5, kl_budget: {nats: 3.0, rate: 0.5}}") == 0
    beta = open_trained_run("runs/g").progress.beta
    assert beta != 1.5
    assert f"beta = {beta:.6g} nats" in card(Path("runs/g"))
    assert f"| beta (nats per unit of reward) | {beta:.6g}, found by kl_budget from 1.5 |" in card(Path("runs/g"))
    assert evaluate_run(Path("runs/g"))["beta"] == beta


def test_a_checkpoint_that_was_passed_over_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml") == 0
    Path("runs/g/checkpoints/00000004/posterior.safetensors").write_bytes(b"")
    assert command("eval", "runs/g") == 0
    assert "Newer and damaged, so passed over: 00000004" in capsys.readouterr().err
    run = json.loads(Path("runs/g/eval/metrics.json").read_text())["run"]
    assert (run["iterations_done"], run["damaged_checkpoints_passed_over"]) == (2, ["00000004"])
    assert "00000002 (newer ones are damaged: 00000004)" in card(Path("runs/g"))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_folder_in_use_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    with holding(Path("runs/g")) as pid:
        assert command(name, "runs/g") == 1
        assert f"runs/g is in use by process {pid} on" in capsys.readouterr().err.replace("\n", " ")
        assert command("sample", "runs/g", "-n", "1") == 1  # no picture: vectors; the lock is not in its way
        assert "in use" not in capsys.readouterr().err
    assert command(name, "runs/g") == 0


def test_two_comparisons_in_one_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/g-compare").mkdir(parents=True)
    with holding(Path("runs/g-compare")):
        assert command("compare", "g.yaml", "--seeds", "1", "--samples", "8", "--points", "0") == 1
    assert "g-compare is in use by process" in capsys.readouterr().err.replace("\n", " ")


@contextmanager
def holding(folder: Path) -> Iterator[int]:
    """Another process, whose id this is, holds the lock of a folder."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with folder_lock(folder):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    yield child
    os.write(done[1], b"x")
    os.waitpid(child, 0)


@pytest.mark.parametrize("place", ["eval", "lora", "eval/metrics.json"])
def test_eval_finds_out_that_it_cannot_write_before_it_draws(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml", "train.iterations=1") == 0
    shutil.rmtree("runs/g/lora")
    if place == "eval/metrics.json":
        Path("runs/g", place).mkdir(parents=True)
    else:
        Path("runs/g", place).symlink_to("/nowhere/at/all")
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        eval_main(["runs/g"])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert f"runs/g/{place}" in said
    assert "Drawing" not in said


def test_outputs_of_other_commands_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "g.yaml", "train.iterations=1") == 0
    (tmp_path / "file").write_text("")
    assert command("sample", "runs/g", "--out", "file") == 1
    assert "file is a file" in capsys.readouterr().err
    assert command("check-reward", "jpeg", "--json", "runs/g") == 1
    assert "runs/g is a folder" in capsys.readouterr().err


def test_leftovers_of_kills_are_cleared_by_the_next_start() -> None:
    assert command("train", "g.yaml", "train.iterations=2") == 0
    run = Path("runs/g")
    for left in ("samples/.000002.png.k3j9x_ab", ".config.yaml.17", "eval/.metrics.json.0123abcd.writing"):
        (run / left).parent.mkdir(exist_ok=True)
        (run / left).write_text("")
    for left in ("checkpoints/.writing-00000009", ".lora.0123abcd.writing"):
        (run / left).mkdir()
    assert command("train", "runs/g", "train.iterations=3") == 0
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def test_folders_and_errors_of_the_interface() -> None:
    with pytest.raises(RunFolderError, match="is no run's folder"):
        open_trained_run(".")
    assert issubclass(DiskError, OSError)


COMPARING = {
    "rtb": "{component: rtb}",
    "trust_pcl": "{component: trust_pcl}",
    "grpo": "{component: grpo}",
    "ddpo": "{component: ddpo}",
    "dpo": "{component: dpo}",
    "reinforce_kl": "{component: reinforce_kl}",
    "reinforce_naive": "{component: reinforce_naive}",
}
ALONE = ["{component: rtb, log_z: per_prompt}", "{component: ddpo, normalise: batch}", "{component: dpok}"]


@pytest.mark.parametrize("objective", COMPARING.values(), ids=COMPARING)
def test_a_group_of_one_is_refused_where_trajectories_are_compared(
    objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "g.yaml", f"objective={objective}", "train.group=1", "train.micro_batch=1") == 1
    assert "train.group is 1" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("objective", ALONE)
def test_a_group_of_one_is_taken_where_none_are(objective: str) -> None:
    small = ["train.group=1", "train.micro_batch=1", "train.iterations=1"]
    assert command("train", "g.yaml", f"objective={objective}", *small) == 0


REWARDS = """
import torch

def broken(images, prompts):
    raise RuntimeError("no scorer here")

def flaky(images, prompts):
    flaky.calls += 1
    if flaky.calls == FAILS:
        raise RuntimeError("no scorer here")
    return -images.square().sum(1)

flaky.calls = 0
"""


@pytest.mark.parametrize(
    "wrong", ["reward={component: 'broken_reward:broken'}", "beta=1e300", "train.lr=1e300 train.grad_clip=1e300"]
)
def test_a_failure_in_iteration_0_leaves_the_name_free(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "broken_reward.py").write_text(REWARDS)
    assert command("train", "g.yaml", "train.iterations=1", *wrong.split(maxsplit=0 if "{" in wrong else -1)) == 1
    assert not Path("runs/g").exists()
    assert command("train", "g.yaml", "train.iterations=1") == 0


def test_a_failure_in_iteration_0_of_a_folder_that_was_there_leaves_what_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "broken_reward.py").write_text(REWARDS)
    Path("runs/g").mkdir(parents=True)
    wrong = "reward={component: 'broken_reward:broken'}"
    assert command("train", "g.yaml", wrong) == 1
    assert list(Path("runs/g").iterdir()) == []
    assert command("train", "g.yaml") == 0
    before = sorted(Path("runs/g").rglob("*"))
    assert command("train", "g.yaml", wrong) == 1  # another config
    assert sorted(Path("runs/g").rglob("*")) == before


def test_a_failure_later_keeps_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "later_reward.py").write_text(REWARDS.replace("FAILS", "3"))
    assert command("train", "g.yaml", "reward={component: 'later_reward:flaky'}") == 1
    assert [path.name for path in Path("runs/g/checkpoints").iterdir()] == ["00000002"]
    assert command("train", "g.yaml", "reward={component: 'later_reward:flaky'}") == 0
    assert [row["iteration"] for row in rows(Path("runs/g"))] == [0, 1, 2, 3]
