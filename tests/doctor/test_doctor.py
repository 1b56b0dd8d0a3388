"""A run under examination: what is said of it is what training then does, and nothing is left of the examination."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.load import load_config
from diffusion_rtb.doctor import examinations
from diffusion_rtb.doctor.dry_run import dry_config
from diffusion_rtb.doctor.examinations import batch, config, reward
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.report import Report, examine_run, found_examinations
from diffusion_rtb.run.process_state import rng_state
from diffusion_rtb.training.rounding_floor import asked_tilt
from tests.oracles.tiny import save_tiny

REWARD = '''
"""Mean brightness, and rewards that end badly."""

import torch

def brightness(images, prompts):
    return images.flatten(1).mean(1)

def broken(images, prompts):
    return images.flatten(1).mean(1) * float("nan")

def constant(images, prompts):
    return images.flatten(1).mean(1) * 0

def greedy(images, prompts):
    return torch.empty(2**50).sum() + images.flatten(1).mean(1)

def impatient(images, prompts):
    raise KeyboardInterrupt
'''

CONFIG = """
prior: {component: stable_diffusion, path: tiny, steps: 2}
reward: {component: "some_reward:brightness"}
beta: 40.0
objective: {component: trust_pcl, length: 1, warm_up_updates: 4}
posterior: {rank: 2, alpha: 2.0}
prompts: {list: [a cat, a dog]}
behaviours: [{component: prior_buffer, share: 0.25, capacity: 5}]
train: {iterations: 2, prompts_per_iteration: 2, group: 4, micro_batch: 2, grid_every: 2, grid_samples: 1, checkpoint_every: 1}
watch: {every: 1, samples: 3}
eval: {samples: 2, prior_samples: 2}
"""


PLAIN = [
    "objective={component: rtb}",
    "behaviours=[]",
    "train.group=2",
    "train.prompts_per_iteration=1",
    "prior.steps=2",
]
"""Overrides for a run that is soon examined."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "tiny")
    (folder / "some_reward.py").write_text(REWARD)
    (folder / "small.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


def examined(project: Path, *overrides: str) -> Report:
    run = load_config(project / "small.yaml", overrides)
    return examine_run(run, project / "runs" / run.name)


def files(project: Path) -> list[Path]:
    """All but what Python makes of the modules there."""
    return sorted(path for path in project.iterdir() if path.name != "__pycache__")


@pytest.fixture(scope="module")
def alone(project: Path) -> Path:
    """A run of the same config that was trained before anything was examined."""
    leaves_with(0, ["train", "small.yaml", "name=alone"])
    return project / "runs" / "alone"


@pytest.fixture(scope="module")
def report(project: Path, alone: Path) -> Report:
    assert alone.is_dir()
    before, listed = rng_state(), files(project)
    found = examined(project)
    assert files(project) == listed
    changed = {name for name, value in rng_state().items() if not torch.equal(before[name], value)}
    assert changed <= {"python"}  # from which the type checks of the tests draw
    return found


@pytest.fixture(scope="module")
def trained(project: Path, report: Report) -> Path:
    """The run of the same config, trained after it was examined."""
    leaves_with(0, ["train", "small.yaml"])
    return project / "runs" / "small"


def leaves_with(code: int, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert (left.value.code or 0) == code


def test_a_sound_run_is_told_that_it_works_and_what_it_costs(report: Report) -> None:
    stops = {name: found.findings for name, found in report.examined.items() if found.verdict == "stop"}
    assert not stops
    assert report.sentence.startswith("This run will work: ")
    for word in ("memory", "training", "evaluation", "disk"):
        assert word in report.sentence
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["format"] == "diffusion_rtb.doctor/1"


def test_the_checkpoint_is_as_large_as_it_is_said_to_be(report: Report, trained: Path) -> None:
    said = report.examined["disk"].numbers["checkpoint_files"]
    checkpoint = trained / "checkpoints" / "00000002"
    for name in ("posterior", "optimizer", "objective", "rng"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        assert said[name] == sum(tensor.nbytes for tensor in tensors.values()), name


def test_training_is_the_same_after_an_examination_as_without_one(trained: Path, alone: Path) -> None:
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (trained, alone)]
    timeless = [[{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run] for run in rows]
    assert timeless[0] == timeless[1]


def test_the_first_iteration_has_the_parity_that_was_said(report: Report, trained: Path) -> None:
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert report.examined["precision"].numbers["parity"] == first["parity"] == 0


def test_the_arithmetic_of_a_batch(report: Report) -> None:
    numbers = report.examined["batch"].numbers
    assert numbers["trajectories"] == {"posterior": 6, "prior": 2}
    assert numbers["micro_batches"] == {"posterior": [2, 2, 2], "prior": [2]}
    # T = 2 calls each: three micro-batches are drawn, scored under p and pushed back; that of the prior is scored and pushed back.
    assert report.examined["time"].numbers["network_calls"] == 2 * (3 * 3 + 2)
    assert report.examined["time"].numbers["dry_prompts"] == 2
    time = report.examined["time"].numbers
    drawn = time["sheets"] / 2  # one sheet with one sample of each prompt
    scored = (
        time["evaluation"] / 2 - 4 * drawn
    ) / 2  # two samples of each side and prompt, those of the posterior scored
    # 3 samples of 2 prompts: of the prior, and of the posterior after 1 and 2 iterations.
    assert time["looks"] == pytest.approx(6 * (drawn + 2 * (drawn + scored)))


def test_the_memory_plan_is_what_torch_counts(project: Path, report: Report) -> None:
    from pipelines.stable_diffusion import StableDiffusion

    prior = StableDiffusion(str(project / "tiny"), steps=2)
    networks = [prior.pipe.unet, prior.pipe.vae, prior.pipe.text_encoder]
    weights = sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))
    prior.attach(rank=2, alpha=2.0)
    trained = sum(parameter.nbytes for parameter in prior.parameters().values())
    numbers = report.examined["memory"].numbers
    parts = {part["name"]: part["bytes"] for part in numbers["parts"]}
    assert parts["prior's networks"] == weights
    assert parts["posterior, AdamW"] == 4 * trained
    assert report.examined["weights"].numbers["trained"] * 4 == trained
    # States and three float64 densities of each step, under p and q; a reward and a prompt's row.
    assert parts["trajectories"] >= 8 * (3 * 4 * 64 * 4 + 2 * 8)
    assert numbers["activations_predicted"] == pytest.approx(numbers["activations_measured"], rel=0.02)
    assert numbers["device"] > parts["prior's networks"] + parts["posterior, AdamW"]


def test_a_run_that_has_begun_is_looked_at_and_not_touched(project: Path, trained: Path) -> None:
    def digest() -> dict[str, str]:
        return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in trained.rglob("*") if f.is_file()}

    before = digest()
    patient = Patient(load_config(project / "small.yaml"), trained)
    assert "2 of 2 iterations" in config.examine(patient).findings[-1].text
    assert patient.dry.first["parity"] == 0
    assert digest() == before
    refused = config.examine(Patient(load_config(project / "small.yaml", ["beta=3.0"]), trained))
    assert refused.verdict == "stop"
    assert "beta: 40.0 there, 3.0 now" in refused.findings[-1].text


def test_a_broken_reward_stops_it_and_the_rest_is_not_reached(project: Path) -> None:
    found = examined(project, "name=broken", "reward.component=some_reward:broken").examined
    assert "is nan for image 0" in found["reward"].findings[0].text
    assert found["time"].findings[0].text == "not reached: see above"
    assert {found[name].verdict for name in ("config", "batch", "weights")} == {"ok"}


def test_what_runs_out_of_memory_is_told_the_settings_that_help(project: Path) -> None:
    found = examined(project, "name=greedy", "reward.component=some_reward:greedy").examined["reward"]
    assert found.verdict == "stop"
    assert "Out of memory" in found.findings[0].text
    assert "train.micro_batch=1 (it is 2)" in found.findings[0].text


def test_a_beta_that_asks_for_nothing_is_told_what_would_be_one_nat(project: Path) -> None:
    patient = Patient(load_config(project / "small.yaml", [*PLAIN, "beta=1e-3"]), project / "runs" / "none")
    found, tilt = reward.examine(patient).findings[-1], asked_tilt(patient.config, patient.samples)
    assert found.verdict == "look"
    assert f"beta={1e-3 / tilt:.2g} makes it one nat" in found.remedy


def test_a_constant_reward_is_worth_a_look(project: Path) -> None:
    """And a moving average of the adapters is counted, in memory and on the disk."""
    found = examined(
        project, *PLAIN, "name=constant", "reward.component=some_reward:constant", "train.ema=0.9"
    ).examined
    assert found["reward"].verdict == found["gradient"].verdict == "look"
    assert "rewards that are all alike" in found["gradient"].findings[0].text
    parts = {part["name"]: part["bytes"] for part in found["memory"].numbers["parts"]}
    assert parts["moving average"] == parts["posterior, AdamW"] / 4
    files = found["disk"].numbers["checkpoint_files"]
    assert files["ema"] == files["posterior"] == parts["moving average"]


def test_rounding_above_the_tilt_stops_it_as_training_would(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*PLAIN, "name=half", "prior.dtype=bfloat16", "beta=1e-3", "train.parity_tolerance=10.0"]
    precision = examined(project, *overrides).examined["precision"]
    assert precision.verdict == "stop"
    assert precision.numbers["precision"] == "bfloat16"
    leaves_with(1, ["train", "small.yaml", *overrides])
    assert "has a rounding floor of" in capsys.readouterr().err
    assert "has a rounding floor of" in precision.findings[-1].text


def test_processes_that_cannot_share_are_a_stop(project: Path) -> None:
    run = load_config(project / "small.yaml")
    one, two, three = (batch.examine(Patient(run, project / "runs" / "none", count)) for count in (1, 2, 3))
    assert "2 could share the prompts" in one.findings[-1].text
    assert two.numbers["trajectories"] == {"posterior": 3, "prior": 1}
    assert three.verdict == "stop"
    assert "3 processes" in three.findings[-1].text


@pytest.mark.parametrize(
    ("prompts", "group", "size", "shares", "tried"),
    [(4, 8, 32, [6, 2], 4), (4, 8, 4, [6, 2], 2), (16, 8, 8, [8], 1), (6, 4, 3, [3, 1], 3), (1, 256, 64, [256], 1)],
)
def test_a_dry_iteration_has_a_whole_share_of_the_micro_batches(
    project: Path, prompts: int, group: int, size: int, shares: list[int], tried: int
) -> None:
    run = load_config(project / "small.yaml")
    sizes = {"prompts_per_iteration": prompts, "group": group, "micro_batch": size}
    dry = dry_config(run.model_copy(update={"train": run.train.model_copy(update=sizes)}), shares)
    assert dry.train.prompts_per_iteration == tried


def test_the_command_prints_a_page_of_80_columns_and_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaves_with(1, ["doctor", "small.yaml", "name=page", "reward.component=some_reward:broken", "--json", "found.json"])
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert "\x1b" not in page
    assert "This run will not work as it is: reward.\n" in page
    found = json.loads((project / "found.json").read_text())
    assert found["verdict"] == "stop"
    assert list(found["examinations"]) == list(found_examinations())
    assert not (project / "runs" / "page").exists()


def test_the_command_refuses_a_config_as_train_does(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = []
    for command in ("train", "doctor"):
        leaves_with(2, [command, "small.yaml", "train.iteration=3"])
        leaves_with(1, [command, "small.yaml", "prior.steps=0"])
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    assert "Did you mean 'train.iterations'?" in messages[0]


def test_an_interrupt_leaves_nothing(project: Path) -> None:
    leaves_with(130, ["doctor", "small.yaml", "name=left", "reward.component=some_reward:impatient"])
    assert not (project / "runs" / "left").exists()


def test_an_examination_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weather.py").write_text(
        '"""Is the sun shining?"""\n'
        "from diffusion_rtb.doctor.finding import Examined, Finding\n\nPLACE = 15\n\n"
        'def examine(patient):\n    return Examined([Finding("look", "it rains")])\n'
    )
    monkeypatch.setattr(examinations, "__path__", [*examinations.__path__, str(tmp_path)])
    names = list(found_examinations())
    assert names.index("config") < names.index("weather") < names.index("batch")
