"""The commands, run for real on a tiny pipeline: train, resume, sample, errors and exit codes."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from diffusion_rtb import __version__
from diffusion_rtb.cli.main import eval_main, main, train_main
from diffusion_rtb.config.load import config_schema, load_config
from diffusion_rtb.objectives.value_gradient import ValueGradient
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]

REWARD = '''
"""Mean brightness."""

def brightness(images, prompts):
    return images.flatten(1).mean(1)

def broken(images, prompts):
    return images.flatten(1).mean(1) / 0 * float("nan")
'''

CONFIG = """
# A tiny run.
prior: {component: stable_diffusion, path: tiny, steps: 3}
reward: {component: "small_reward:brightness"}
beta: 2.0
posterior: {rank: 2, alpha: 2.0}
prompts: {list: [a cat, a dog]}
train:
  iterations: 2
  prompts_per_iteration: 2
  group: 2
  micro_batch: 2
  grid_every: 1
  grid_samples: 1
  checkpoint_every: 1
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its pipeline and reward, and the finished run of `diffusion-rtb train`."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "tiny")
    (folder / "small_reward.py").write_text(REWARD)
    (folder / "small.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_exits_with(0, ["train", "small.yaml"])
    return folder


@pytest.fixture
def project(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def main_exits_with(code: int, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert (left.value.code or 0) == code


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_a_complete_run(project: Path) -> None:
    run = project / "runs" / "small"
    assert load_config(run) == load_config(project / "small.yaml")
    assert len(metrics(run)) == 2
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    card = (run / "lora" / "README.md").read_text()
    assert "brightness" in card
    assert "load_lora_weights" in card
    assert len(list((run / "samples").glob("*.png"))) == 2


def test_a_finished_run_is_left_as_it_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(project / "runs" / "small")
    main_exits_with(0, ["train", "small.yaml"])
    assert metrics(project / "runs" / "small") == before
    assert "runs/small/lora" in capsys.readouterr().err.replace("\n", "")


def test_a_run_goes_on_to_more_iterations(project: Path) -> None:
    main_exits_with(0, ["train", "small.yaml", "name=longer"])
    main_exits_with(0, ["train", "small.yaml", "name=longer", "train.iterations=3"])
    assert len(metrics(project / "runs" / "longer")) == 3


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_wait_before_the_first_iteration_is_announced(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """In one sentence, and then part by part as each is done."""
    monkeypatch.setattr(ValueGradient, "round_updates", 1)
    v = f"objective={{component: value_gradient, warm_up_updates: 3, rounds: {rounds}, walks: 2}}"
    buffer = "behaviours=[{component: prior_buffer, share: 0.5, capacity: 5}]"
    walked = ["4 trajectories led by V", "updates of V where it led"]
    for iterations, said in ((1, True), (2, False)):
        main_exits_with(
            0, ["train", "small.yaml", f"name=announced{rounds}", v, buffer, f"train.iterations={iterations}"]
        )
        told = "".join(capsys.readouterr())
        sentence = "Before the first iteration: 5 samples of the prior for each prompt, 2 in all, then 3 updates of V"
        end = ", and 2 times 2 trajectories of each prompt led by V, with updates after them." if rounds else "."
        assert (sentence + end in " ".join(told.split())) is said
        done = re.findall(r"^ {4}([^:]+?)(?:, mean reward \S+)?: [\d.]+ s$", told, re.MULTILINE)
        assert done == (["10 samples of the prior", "3 updates of V", *rounds * walked] if said else [])


def test_another_config_in_the_same_folder_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_with(1, ["train", "small.yaml", "beta=3.0"])
    message = capsys.readouterr().err
    assert "beta: 2.0 there, 3.0 now" in message
    assert "Traceback" not in message


def test_a_broken_reward_stops_with_its_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_with(1, ["train", "small.yaml", "name=broken", "reward.component=small_reward:broken"])
    message = capsys.readouterr().err
    assert "is nan for image 0, prompt 'a " in message
    assert "--traceback" in message


def test_a_signal_ends_training_with_a_checkpoint(project: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "small.yaml", "name=stopped", "train.iterations=100000"]
    process = subprocess.Popen([*command, "train.checkpoint_every=100000"], stderr=subprocess.PIPE, text=True)
    lines = project / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (lines.is_file() and lines.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said
    done = len(metrics(lines.parent))
    assert [path.name for path in (lines.parent / "checkpoints").iterdir()] == [f"{done:08d}"]


def test_a_traceback_is_shown_on_demand(project: Path) -> None:
    with pytest.raises(ValueError, match="There is no reward named 'jpg'"):
        main(["train", "small.yaml", "name=other", "reward.component=jpg", "--traceback"])
    assert not (project / "runs" / "other").exists()


@pytest.mark.parametrize("prior", [False, True])
def test_samples_are_pictures_at_fixed_seeds(project: Path, prior: bool, tmp_path: Path) -> None:
    ask = ["sample", "runs/small", *(["--prior"] if prior else []), "--prompt", "a cat", "--seed", "3"]
    main_exits_with(0, [*ask, "-n", "2", "--out", str(tmp_path / "a")])
    # Beside another prompt and in another number, the same noise gives the same picture.
    main_exits_with(0, [*ask, "--prompt", "a dog", "-n", "1", "--out", str(tmp_path / "b")])
    names = ["000-a-cat-0.png", "000-a-cat-1.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["000-a-cat-0.png", "001-a-dog-0.png"]
    first, again = (Image.open(tmp_path / side / names[0]) for side in "ab")
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != Image.open(tmp_path / "a" / names[1]).tobytes()


def test_samples_never_replace_others_silently(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["sample", "runs/small", "--prior", "--prompt", "猫", "--prompt", "😀", "-n", "1", "--out", str(tmp_path)]
    main_exits_with(0, ask)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(held) == ["000-猫-0.png", f"001-{hashlib.sha256('😀'.encode()).hexdigest()[:12]}-0.png"]
    capsys.readouterr()
    main_exits_with(1, [*ask, "--seed", "1"])
    assert (
        "is there already (2 of 2 files): name another folder by --out, or say --overwrite" in capsys.readouterr().err
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    main_exits_with(0, [*ask, "--seed", "1", "--overwrite"])
    assert all(path.read_bytes() != held[path.name] for path in tmp_path.iterdir())


def test_the_prior_can_be_sampled_from_a_config_alone(project: Path, tmp_path: Path) -> None:
    main_exits_with(0, ["sample", "small.yaml", "--prior", "-n", "1", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_prior_is_steered_from_a_config_alone(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["sample", "small.yaml", "--steer", "{component: smc, particles: 4}", "--prompt", "a cat", "-n", "5"]
    main_exits_with(0, [*ask, "--beta", "200", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert "nats at beta 200, 2 estimates: a cat" in capsys.readouterr().err


def test_evaluation_writes_its_numbers(project: Path) -> None:
    main_exits_with(0, ["eval", "runs/small", "eval.samples=2", "eval.prior_samples=2", "eval.bootstrap=10"])
    assert json.loads((project / "runs" / "small" / "eval" / "metrics.json").read_text())
    assert (project / "runs" / "small" / "eval" / "side_by_side.png").is_file()


@pytest.mark.parametrize(
    "argv, code, expected",
    [
        (["train", "small.yaml", "train.grup=3"], 2, "Did you mean 'train.group'?"),
        (["train", "nowhere.yaml"], 2, "There is no config 'nowhere.yaml'"),
        (["train", "small.yaml", "name=new", "prior.eta=0.0"], 1, "eta"),
        (["train", "small.yaml", "name=new", "prior.path=tiny2"], 1, "tiny2"),
        (["config", "small.yaml", "reward.scale=1"], 1, "no argument 'scale'"),
        (["config"], 2, "Which config?"),
        (["eval", "runs/small", "beta=3"], 2, "only eval.* keys"),
        (["eval", "runs/nothing"], 2, "There is no config"),
        (["sample", "small.yaml"], 1, "a run's folder is asked for: give runs/small"),
        (
            ["sample", "runs/small", "--checkpoint", "1", "-n", "1", "--out", "runs/of-1"],
            0,
            "Checkpoint 00000001 (asked for)",
        ),
        (["sample", "small.yaml", "--prior", "--beta", "3"], 2, "is for --steer"),
        (["sample", "small.yaml", "--steer", "smd"], 1, "Did you mean 'smc'?"),
        (["sample", "small.yaml", "--steer", "{component: smc, particles: 1}"], 1, "greater than or equal to 2"),
        (["sample", "small.yaml", "--steer", "best_of", "--batch", "8"], 1, "BestOf draws 16 particles at once"),
        (["sample", "runs/small", "--checkpoint", "best"], 1, "names no best checkpoint"),
        (["sample", "runs/small", "--prior", "--checkpoint", "1"], 2, "is one of the posterior: leave it out"),
        (["eval", "runs/small", "--checkpoint", "7"], 1, "no checkpoint 00000007. Those kept: 00000002, 00000001"),
    ],
)
def test_errors_are_one_message_and_a_code(
    project: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, expected: str
) -> None:
    main_exits_with(code, argv)
    said = capsys.readouterr()
    assert expected in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (project / "runs" / "new").exists()


def test_the_resolved_config_is_printed_as_it_is_saved(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = (project / "runs" / "small" / "config.yaml").read_text()
    main_exits_with(0, ["config", "small.yaml"])
    assert capsys.readouterr().out == saved
    main_exits_with(0, ["train", "small.yaml", "--print-config"])
    assert capsys.readouterr().out == saved


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_with(0, ["config", "--schema"])
    assert json.loads(capsys.readouterr().out) == config_schema()


@pytest.mark.parametrize("command", ["train", "eval", "sample", "config", "compare"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_with(0, [command, "--help"])
    assert f"diffusion-rtb {command} " in capsys.readouterr().out


def test_the_scripts_are_the_commands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script, entry in (("train.py", train_main), ("eval.py", eval_main)):
        with pytest.raises(SystemExit) as left:
            entry(["--help"])
        assert (left.value.code or 0) == 0
        assert f"python {script}" in capsys.readouterr().out
        assert f"{entry.__name__}()" in (ROOT / script).read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_with(0, ["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_train_py_runs_from_elsewhere(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "small.yaml", "--print-config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "component: small_reward:brightness" in done.stdout
