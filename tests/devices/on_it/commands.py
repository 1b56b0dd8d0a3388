"""Every command, objective and behaviour on a device that is not the CPU, and the numbers that they have on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import short_names
from tests.oracles.architecture import save_architecture
from tests.oracles.pretended_device import DEVICE
from tests.oracles.tiny import save_tiny

BEHAVIOURS: list[dict[str, Any]] = [
    {"component": "on_policy", "exploration": 0.2, "until": 5},
    {"component": "prior_buffer", "share": 0.25, "capacity": 2},
    {"component": "replay", "share": 0.25, "capacity": 4, "priority": "importance"},
    {"component": "back_and_forth", "share": 0.25},
]
LATENTS = {
    "reward": {"component": "brightness"},
    "beta": 200.0,
    "objective": {"component": "trust_pcl", "length": 1, "warm_up_updates": 3},
    "prompts": {"list": ["a cat", "a dog"]},
    "posterior": {"rank": 2, "alpha": 2.0},
    "behaviours": BEHAVIOURS,
    "train": {
        "iterations": 2,
        "prompts_per_iteration": 1,
        "group": 4,
        "micro_batch": 4,
        "gradient_steps": 1,
        "checkpoint_every": 1,
        "grid_every": 2,
        "grid_samples": 1,
        "ema": 0.5,
    },
    "eval": {"samples": 4, "prior_samples": 4, "batch": 8, "embedder": None},
}
DENSITY = {"component": "density", "density": {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}}
VECTORS = {
    "prior": {"component": "gaussian", "mean": [1.0, -2.0], "covariance": [[2.0, 0.6], [0.6, 0.5]], "steps": 4},
    "reward": DENSITY,
    "beta": 1.0,
    "prompts": {"list": [""]},
    "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 8, "micro_batch": 8, "grid_every": 0, "lr": 0.01},
    "eval": {"samples": 20, "prior_samples": 20, "batch": 20},
}


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code


def trained(folder: Path, config: dict[str, Any], device: str, overrides: Sequence[str] = ()) -> Path:
    """The folder of a run of this config on this device."""
    where = folder / device.replace(":", "")
    where.mkdir(exist_ok=True)
    (where / "run.yaml").write_text(yaml.safe_dump(config))
    run("train", str(where / "run.yaml"), f"prior.device={device}", f"out={where}", *overrides)
    return where / "run"


def check_same_numbers(here: Path, there: Path) -> None:
    """Of all iterations; other kernels round otherwise, and the loss of a posterior that is the prior is nothing but rounding."""
    found = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (here, there)]
    assert len(found[0]) == len(found[1])
    for mine, its in zip(*found, strict=True):
        a, b = json.loads(mine), json.loads(its)
        assert a.keys() == b.keys()
        assert b["parity"] == 0
        for name in ("reward", "elbo", "kl", "log_z", "ess", "residual_std"):
            assert b[name] == pytest.approx(a[name], rel=0.01, abs=0.01), name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run of a tiny Stable Diffusion on both devices, the pretended one stopped and resumed.

    Its networks take turns there, and it keeps a moving average, which is what is looked at, evaluated and handed out.
    """
    folder = tmp_path_factory.mktemp("pictures")
    prior = {"component": "stable_diffusion", "path": str(save_tiny(folder / "tiny")), "steps": 2}
    config = LATENTS | {"prior": prior}
    trained(folder, config, "cpu")
    stopped = trained(folder, config, DEVICE, ["train.iterations=1", "prior.memory.offload=all"])
    run("train", str(stopped), "train.iterations=2")
    return folder


def test_training_and_resuming_give_the_numbers_of_the_cpu(pictures: Path) -> None:
    here, there = pictures / "cpu/run", pictures / "pretended0/run"
    check_same_numbers(here, there)
    adapters = [load_file(next((folder / "lora").glob("pytorch_lora_weights.safetensors"))) for folder in (here, there)]
    torch.testing.assert_close(adapters[0], adapters[1], rtol=0, atol=2e-3)
    for group in ("ema", "posterior"):
        held = [load_file(folder / "checkpoints/00000002" / f"{group}.safetensors") for folder in (here, there)]
        torch.testing.assert_close(held[0], held[1], rtol=0, atol=2e-3)
    sheets = [np.asarray(Image.open(folder / "samples/000002.png"), dtype=int) for folder in (here, there)]
    assert abs(sheets[0] - sheets[1]).max() <= 1


def test_evaluation_gives_the_numbers_of_the_cpu(pictures: Path) -> None:
    found = []
    for name in ("cpu", "pretended0"):
        run("eval", str(pictures / name / "run"))
        found.append(json.loads((pictures / name / "run/eval/metrics.json").read_text()))
    here, there = (each["overall"] for each in found)
    assert there["reward"]["prior"] == pytest.approx(here["reward"]["prior"], abs=1e-4)
    assert there["reward"]["posterior"] == pytest.approx(here["reward"]["posterior"], abs=1e-4)
    assert there["elbo"] == pytest.approx(here["elbo"], rel=0.01)


def test_samples_are_those_of_the_cpu(pictures: Path) -> None:
    drawn = []
    for name in ("cpu", "pretended0"):
        out = pictures / name / "out"
        run("sample", str(pictures / name / "run"), "--prompt", "a cat", "-n", "1", "--out", str(out))
        drawn.append([np.asarray(Image.open(path), dtype=int) for path in sorted(out.glob("*.png"))])
    assert len(drawn[0]) == len(drawn[1]) >= 1
    assert all(abs(a - b).max() <= 1 for a, b in zip(*drawn, strict=True))


def test_a_reward_is_checked_there(pictures: Path) -> None:
    run("check-reward", "brightness", "--device", DEVICE)


def test_a_run_is_examined_there(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VECTORS | {"out": str(tmp_path)}))
    run("doctor", str(tmp_path / "run.yaml"), f"prior.device={DEVICE}", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["examinations"]
    assert all(examined["reached"] for examined in found.values())
    assert found["time"]["numbers"]["network_calls"] == 3 * 4  # drawn, scored and pushed back, in 4 steps


@pytest.mark.parametrize("objective", sorted(short_names("objective")))
def test_every_objective_gives_the_numbers_of_the_cpu(objective: str, tmp_path: Path) -> None:
    few = {"warm_up_updates": 3} if objective == "value_gradient" else {}
    config = VECTORS | {"objective": {"component": objective} | few}
    check_same_numbers(trained(tmp_path, config, "cpu"), trained(tmp_path, config, DEVICE))


def test_noised_samples_as_targets_give_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    buffer = {"component": "prior_buffer", "share": 0.5, "capacity": 8, "noised": True}
    objective = {"component": "value_gradient", "warm_up_updates": 3, "from_samples": 0.5}
    config = VECTORS | {"objective": objective, "behaviours": [buffer]}
    check_same_numbers(trained(tmp_path, config, "cpu"), trained(tmp_path, config, DEVICE))


@pytest.mark.parametrize("prior", ["gaussian", "gmm"])
def test_a_known_posterior_is_compared_with_there(prior: str, tmp_path: Path) -> None:
    config = VECTORS if prior == "gaussian" else VECTORS | MIXTURE
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    options = ["--objectives", "rtb", "--behaviours", "on_policy", "--seeds", "1", "--samples", "50", "--points", "1"]
    run("compare", str(tmp_path / "run.yaml"), *options, f"prior.device={DEVICE}", f"out={tmp_path}")


MIXTURE = {
    "prior": {
        "component": "gmm",
        "means": [[-1.0, 0.0], [1.0, 0.0]],
        "variance": 0.1,
        "steps": 3,
        "width": 8,
        "layers": 1,
    },
    "reward": {
        "component": "density",
        "density": {"means": [[-1.0, 0.0], [1.0, 0.0]], "weights": [0.8, 0.2], "variance": 0.1},
        "minus": {"means": [[-1.0, 0.0], [1.0, 0.0]], "variance": 0.1},
    },
}


def test_the_benchmark_measures_there(tmp_path: Path) -> None:
    row = {
        "prior": {"component": "stable_diffusion", "path": f"random:{save_architecture(tmp_path / 'tiny')}"},
        "steps": 2,
        "batches": [1],
        "iterations": [{"batch": 2, "steps": 2}],
        "dtypes": ["float32"],
        "compile": 1000.0,
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": row}))
    options = ["--models", str(tmp_path / "models.yaml"), "--device", DEVICE, "--out", str(tmp_path / "out")]
    run("benchmark", *options, "--part", "tiny-float32-iteration")
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())["parts"]
    assert found["tiny-float32-iteration-b2-t2"]["parity"] == 0
