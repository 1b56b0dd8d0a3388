"""A run that trains the network's own weights: it goes on number for number, and every command takes it for a run like others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.doctor.examinations import gradient, memory, weights
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.sizes import module_bytes
from diffusion_rtb.evaluation.subject import Options
from diffusion_rtb.evaluation.subjects.run import RunSubject
from diffusion_rtb.run.checkpoint_reading import CheckpointError
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble, check_run, training
from diffusion_rtb.training.rounding_floor import OWN_SIZE, moved, rounding_floor
from rewards.brightness import Brightness
from tests.oracles.tiny import save_tiny

CONFIG = """
prior: {component: stable_diffusion, path: tiny, steps: 2, device: cpu}
posterior: {full: true}
reward: {component: brightness}
beta: 40.0
prompts: {list: [a cat, a dog]}
train: {iterations: 2, prompts_per_iteration: 1, group: 2, micro_batch: 2, lr: 1.0e-4, ema: 0.5, grid_every: 0}
eval: {samples: 2, prior_samples: 2}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    save_tiny(folder / "tiny")
    (folder / "own.yaml").write_text(CONFIG)
    return folder


def places(project: Path) -> list[str]:
    return [f"prior.path={json.dumps(str(project / 'tiny'))}", f"out={json.dumps(str(project / 'runs'))}"]


def config(project: Path, *overrides: str) -> RunConfig:
    return load_config(project / "own.yaml", [*places(project), *overrides])


def command(*argv: str | Path) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in argv])
    assert not left.value.code


@pytest.fixture(scope="module")
def trained(project: Path, shapes_unchecked_in_module: None) -> Path:
    """By the command, in one go."""
    command("train", project / "own.yaml", *places(project))
    return project / "runs" / "own"


def held(run: Path, group: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "00000002" / f"{group}.safetensors")


def test_it_goes_on_number_for_number(project: Path, trained: Path) -> None:
    part = config(project, "name=part", "train.iterations=1")
    assemble(part).fit()
    assemble(config(project, "name=part")).fit()
    for group in ("posterior", "ema", "optimizer"):
        once, twice = held(trained, group), held(project / "runs" / "part", group)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_checkpoint_is_a_state_dict_of_the_stock_network(project: Path, trained: Path) -> None:
    """The last numbers as posterior.safetensors, and the average, which is handed out, as a folder of diffusers, too."""
    stock = UNet2DConditionModel.from_pretrained(project / "tiny", subfolder="unet")
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    average = UNet2DConditionModel.from_pretrained(trained / "posterior", subfolder="unet").state_dict()
    for group in ("posterior", "ema"):
        stock.load_state_dict(held(trained, group))
        assert all(not torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in stock.state_dict().items())
    card = (trained / "posterior" / "README.md").read_text()
    assert "Fully fine-tuned weights that turn" in card
    assert "| trained in full | the whole network |" in card
    assert "UNet2DConditionModel.from_pretrained(folder, subfolder='unet', dtype=torch.float32)" in card
    assert "lora" not in card.lower()
    assert not (trained / "lora").exists()


def test_the_commands_take_it_for_a_run_like_others(trained: Path, tmp_path: Path) -> None:
    with RunSubject(trained, Options()).held():
        loaded = RunSubject(trained, Options()).load()
    (seen,) = loaded.posterior.batches()
    assert seen.drawn.log_q is not None
    assert seen.drawn.log_p is not None
    assert bool((seen.drawn.log_q != seen.drawn.log_p).all())
    command("sample", trained, "--out", tmp_path, "--count", "1")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_another_kind_of_posterior_cannot_start_from_it(project: Path, trained: Path) -> None:
    wanted = config(project, "name=third", f"start={json.dumps(str(trained))}", "posterior={rank: 2}")
    with pytest.raises(CheckpointError, match=r"adapter\.full: true in the checkpoint, absent now"), training(wanted):
        pass


def test_the_doctor_counts_it(project: Path, trained: Path) -> None:
    """Weights twice, the second time in float32, gradients and two moments: 16 bytes and the prior's own, per number."""
    size = sum(value.numel() for value in held(trained, "posterior").values())
    patient = Patient(
        config(project, "name=asked", "prior.dtype=bfloat16", "train.ema=null", "train.lr=1e-3"), project / "asked"
    )
    ahead = weights.examine(patient).numbers
    assert (ahead["trained"], ahead["trained_bytes"]) == (size, 16 * size)
    parts = {part["name"]: part["bytes"] for part in memory.examine(patient).numbers["parts"]}
    assert parts["posterior, AdamW"] == 16 * size
    plain: Any = build(patient.config.prior, "prior")
    assert parts["prior's networks"] == module_bytes(plain.pipe.unet, plain.pipe.vae, plain.pipe.text_encoder)
    assert ahead["networks"]["unet"]["loaded"] == 2 * size
    # An update by 1e-3 is hasty for numbers of this size.
    step = gradient.examine(patient)
    flat = torch.cat([parameter.detach().flatten() for parameter in plain.pipe.unet.parameters()]).float()
    assert step.numbers["step"] == pytest.approx(1e-3 / float(flat.square().mean().sqrt()))
    assert step.numbers["step"] > gradient.HASTY
    assert "train.lr=" in step.findings[-1].remedy
    # The copy to go back to: the posterior and two moments.
    assert parts["copy to go back to"] == 12 * size


def test_what_cannot_go_together_is_refused_before_anything_loads(project: Path) -> None:
    wanted = config(project, "name=wrong", "posterior={full: true, rank: 4}")
    with pytest.raises(ValueError, match="posterior: full: true beside rank: 4"):
        check_run(wanted, project / "runs" / "wrong")
    analytic = load_config("configs/gaussian.yaml", ["posterior={full: true}"])
    with pytest.raises(ValueError, match="attach of prior 'gaussian' has no argument 'full'"):
        check_run(analytic, project / "runs" / "wrong")


def test_the_rounding_floor_is_measured_with_next_to_no_change(project: Path) -> None:
    """In float32 nothing but the change itself is there: moved ten times as far, networks differ by a hundred times as much."""
    prior: Any = build(config(project).prior, "prior")
    prior.attach(full=True)
    sampler = Sampler(prior, Brightness(), ["a cat", "a dog"], 2)
    own = sampler.draw([0, 1], [0, 1])
    floor = rounding_floor(sampler, own)
    with moved(prior.parameters(), 10 * OWN_SIZE):
        kl = sampler.with_kl(replace(own, log_q=None, log_p=None, mean_p=None, kl=None)).kl
    assert kl is not None
    assert float(kl.sum(1).mean()) == pytest.approx(100 * floor, rel=0.1)
