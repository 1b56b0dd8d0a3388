"""Small runs from end to end on a device: the same functions run on the CPU here and, under the marker `gpu`, on a card.

`make gpu-check` runs all that is so marked, here and elsewhere in tests/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from diffusion_rtb.benchmark.device import peak_memory, precision, waits
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build
from diffusion_rtb.doctor.sizes import GraphBytes
from tests.oracles.architecture import save_architecture
from tests.oracles.tiny import save_tiny

gpu = pytest.mark.gpu
ON_GPU = [("cuda", dtype) for dtype in ("float32", "tf32", "float16", "bfloat16")]
PLACES = [("cpu", "float32"), *(pytest.param(*place, marks=gpu) for place in ON_GPU)]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
PROMPTS = ["a cat", "a dog"]
ITERATIONS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights"))


def prior_of(weights: Path, device: str, dtype: str, steps: int = 3) -> dict[str, Any]:
    held = "float32" if dtype == "tf32" else dtype
    return {"component": "stable_diffusion", "path": str(weights), "steps": steps, "device": device, "dtype": held}


def loaded(weights: Path, device: str, dtype: str = "float32", steps: int = 3) -> Any:
    """The prior with its posterior, which is no longer the prior."""
    prior = build(prior_of(weights, device, dtype, steps), "prior")
    prior.attach(rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return prior


def train(weights: Path, device: str, dtype: str, folder: Path, iterations: int = ITERATIONS) -> None:
    """A run in `folder`, whose config is beside it."""
    config = {
        "name": folder.name,
        "out": str(folder.parent),
        "prior": prior_of(weights, device, dtype),
        "posterior": {"rank": 2},
        "reward": {"component": "brightness"},
        "beta": 100.0,
        "objective": {"component": "rtb", "log_z": "per_prompt"},
        "prompts": {"list": PROMPTS},
        "behaviours": [{"component": "prior_buffer", "share": 0.5, "capacity": 2}],
        "train": {
            "iterations": iterations,
            "prompts_per_iteration": 2,
            "group": 2,
            "micro_batch": 4,
            "checkpoint_every": 1,
            "grid_every": 0,
            "rounding_share": None,
        },
        "eval": {"samples": 2, "prior_samples": 2, "batch": 4, "bootstrap": 50, "metrics": ["reward", "kl", "elbo"]},
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    assert left_with("train", file) == 0


def left_with(*argv: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in argv])
    return int(left.value.code or 0)


def logged(folder: Path) -> list[dict[str, float]]:
    """What a run logged, without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_run_begins_at_the_prior_and_goes_on_with_the_same_numbers(
    weights: Path, tmp_path: Path, device: str, dtype: str
) -> None:
    """Trained, resumed, evaluated, sampled."""
    with precision(dtype):
        train(weights, device, dtype, tmp_path / "straight")
        straight = logged(tmp_path / "straight")
        assert len(straight) == ITERATIONS
        assert straight[0]["kl"] == 0.0
        assert straight[-1]["kl"] != 0.0
        assert all(row["parity"] <= (0.0 if device == "cpu" else 1e-3) for row in straight)
        assert ("rounding_floor" in straight[0]) == (dtype != "float32")
        train(weights, device, dtype, tmp_path / "parts", iterations=1)
        assert left_with("train", tmp_path / "parts", f"train.iterations={ITERATIONS}") == 0
        assert logged(tmp_path / "parts") == straight
        assert left_with("eval", tmp_path / "parts") == 0
        found = json.loads((tmp_path / "parts" / "eval" / "metrics.json").read_text())
        assert found["overall"]["kl"]["mean"] != 0
        posterior, prior = (drawn(tmp_path, *way) for way in ((), ("--prior",)))
    assert posterior.keys() == prior.keys()
    assert posterior != prior


def drawn(tmp_path: Path, *options: str) -> dict[str, bytes]:
    out = tmp_path / f"pictures{''.join(options)}"
    assert left_with("sample", tmp_path / "parts", "-n", "1", "--out", out, *options) == 0
    return {file.name: Image.open(file).tobytes() for file in out.glob("*.png")}


@pytest.mark.parametrize("device", DEVICES)
def test_objectives_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pytest.importorskip("ot", reason="comparing needs the extra `compare`")
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "gaussian",
        "prior": {"component": "gaussian", "mean": [1.0], "steps": 5, "device": device},
        "reward": {"component": "density", "density": {"mean": [2.0], "precision": 1.0}},
        "beta": 1.0,
        "prompts": {"list": [""]},
        "train": {"iterations": 2, "prompts_per_iteration": 1, "group": 16, "micro_batch": 16, "grid_every": 0},
    }
    (tmp_path / "gaussian.yaml").write_text(yaml.safe_dump(config))
    small = ("--samples", 60, "--points", 2, "--point-samples", 20, "--seeds", 1)
    assert left_with("compare", "gaussian.yaml", "--objectives", "rtb", *small) == 0
    table = (tmp_path / "runs" / "gaussian-compare" / "table.md").read_text()
    assert "rtb" in table
    assert "nan" not in table


@pytest.mark.parametrize("device, dtype", PLACES)
def test_recording_changes_no_bit_and_replay_finds_every_number(weights: Path, device: str, dtype: str) -> None:
    with precision(dtype):
        prior = loaded(weights, device, dtype)
        trajectory = rollout(prior, PROMPTS, [0, 1])
        assert torch.equal(score(prior, PROMPTS, trajectory), trajectory.log_prob)
        assert torch.equal(bare(prior), bare(prior, recorded=True))


def bare(prior: Any, *, recorded: bool = False) -> torch.Tensor:
    rows = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    call = prior.arguments(PROMPTS) | {"generator": rows, "output_type": "latent", "return_dict": False}
    if not recorded:
        return prior.pipe(**call)[0]
    with TrajectoryRecorder(prior.pipe.scheduler):
        return prior.pipe(**call)[0]


@gpu
def test_a_card_draws_what_the_cpu_draws(weights: Path) -> None:
    """Noise comes from the CPU's generators: in float32 trajectories agree up to rounding."""
    with precision("float32"):
        here, there = (rollout(loaded(weights, device), PROMPTS, [0, 1]) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.x.cpu(), here.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there.log_prob.cpu(), here.log_prob, rtol=1e-4, atol=1e-2)


def phases(prior: Any, batch: int) -> tuple[Trajectory, dict[str, Callable[[], object]]]:
    """What an iteration makes of a trajectory's steps."""
    prompts = [PROMPTS[0]] * batch
    trajectory = rollout(prior, prompts, range(batch))
    ones = torch.ones_like(trajectory.log_prob)
    call = prior.arguments(prompts)
    return trajectory, {
        "rollout": lambda: rollout(prior, prompts, range(batch)),
        "score": lambda: score(prior, prompts, trajectory),
        "gradient": lambda: replay_backward(prior.pipe, trajectory, ones, dtype=torch.float64, call=call),
    }


@gpu
@pytest.mark.parametrize("phase", ["rollout", "score", "gradient"])
def test_the_host_waits_at_most_once_a_step_whatever_the_batch(weights: Path, phase: str) -> None:
    found: dict[tuple[int, int], int] = {}
    for steps in (3, 11):
        prior = loaded(weights, "cuda", steps=steps)
        for batch in (2, 6):
            action = phases(prior, batch)[1][phase]
            action()
            found[steps, batch] = waits(action, prior.device) or 0
    assert found[3, 2] == found[3, 6]
    assert found[11, 2] == found[11, 6]
    per_step = (found[11, 2] - found[3, 2]) / 8
    assert per_step <= 1, found


@pytest.mark.parametrize("device", DEVICES)
def test_activations_do_not_grow_with_the_number_of_steps(weights: Path, device: str) -> None:
    most = {}
    for steps in (3, 11):
        trajectory, of = phases(loaded(weights, device, steps=steps), 4)
        of["gradient"]()  # what is made once is there
        most[steps] = GraphBytes([trajectory.x]).during(of["gradient"])
    assert 0 < most[11] <= 1.001 * most[3]


@gpu
def test_allocated_memory_does_not_grow_with_the_number_of_steps(weights: Path) -> None:
    most = {}
    for steps in (4, 24):
        prior = loaded(weights, "cuda", steps=steps)
        action = phases(prior, 8)[1]["gradient"]
        action()
        held = torch.cuda.memory_allocated()
        most[steps] = (peak_memory(action, prior.device) or 0) - held
    assert most[24] <= 1.05 * most[4]


@gpu
def test_the_benchmark_measures_all_that_a_card_can(tmp_path: Path) -> None:
    """With waits and memory, in every dtype, and compiled."""
    architecture = save_architecture(tmp_path / "tiny")
    row: dict[str, Any] = {
        "prior": {"component": "stable_diffusion", "path": f"random:{architecture}"},
        "steps": 3,
        "batches": [1, 2],
        "iterations": [{"batch": 2, "steps": 2}],
        "dtypes": ["bfloat16", "float16", "tf32", "float32"],
        "compile": 30.0,
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": row}))
    given: Sequence[object] = ("--models", tmp_path / "models.yaml", "--device", "cuda", "--out", tmp_path / "out")
    assert left_with("benchmark", *given, "--minutes", "3") == 0
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())["parts"]
    assert [name for name, part in found.items() if "skipped" in part or "out_of_memory" in part] == []
    assert found["tiny-bfloat16-sampling-b1-t3"]["waits_per_step"] > 0
    assert found["tiny-float16-iteration-b2-t2"]["peak_memory"] > 0
    assert found["tiny-bfloat16-compiled-b1-t3"]["seconds"] > 0
