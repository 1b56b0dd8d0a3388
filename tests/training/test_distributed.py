"""Two processes on gloo: the numbers of one, what all agree on, and that none waits for one that has failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.processes import check_launch
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import BETA, QUADRATIC, differing, gradient_of, rows, run, state
from tests.oracles.several import ended, started
from tests.oracles.tiny import save_tiny
from tests.training.test_trainer import run_config

ROOT = Path(__file__).parents[2]


def gradient(rank: int, world: int, prior: Path, out: Path) -> None:
    """One iteration; the gradients that reach the optimizer go to a file per rank."""
    sizes = {"grad_clip": 1e9, "gradient_steps": None, "prompts_per_iteration": 2, "micro_batch": 4}
    behaviour = [{"component": "prior_buffer", "share": 0.5, "capacity": 4}]
    config = run_config(
        prior, out, objective={"component": "rtb", "log_z": "vargrad"}, train=sizes, behaviours=behaviour
    )
    trainer = assemble(config)
    assert trainer.processes.count == world
    with torch.no_grad():  # off the prior, so that every adapter has a gradient
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.prior.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.step()
    save_file({"gradient": gradient_of(trainer.prior)}, out / f"gradient-{world}-{rank}.safetensors")


def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    prior = save_tiny(tmp_path / "prior")
    assert ended(started(2, gradient, 2, prior, tmp_path)) == [0, 0]
    (tmp_path / "alone").mkdir()
    gradient(0, 1, prior, tmp_path / "alone")
    one = load_file(tmp_path / "alone" / "gradient-1-0.safetensors")["gradient"]
    for rank in (0, 1):
        two = load_file(tmp_path / f"gradient-2-{rank}.safetensors")["gradient"]
        # fp32 sums in another order and micro-batch; a missing average would be off by a factor or by the other's prompt.
        assert float((one - two).norm() / one.norm()) < 1e-4


def made(out: Path, **train: Any) -> Trainer:
    """Statistics, a buffer, exploration, a budget, updates, an average; in an iteration the second pass over 3 prompts begins."""
    return run(
        out,
        reward={
            "component": "standardise",
            "reward": {"component": "density", "density": QUADRATIC},
            "samples": 30,
        },
        behaviours=[
            {"component": "on_policy", "exploration": 0.5, "until": 3},
            {"component": "prior_buffer", "share": 0.25, "capacity": 8},
        ],
        beta={"value": BETA, "kl_budget": {"nats": 1.0, "rate": 0.2}},
        prompts={"list": ["a", "b", "c"]},
        watch={
            "every": 2,
            "judges": ["tests.oracles.watching:first"],
            "embedder": "tests.oracles.watching:raised",
            "samples": 4,
        },
        train={
            "iterations": 5,
            "prompts_per_iteration": 2,
            "updates_per_iteration": 2,
            "checkpoint_every": 1,
            "ema": 0.6,
        }
        | train,
    )


def acting(trainer: Trainer, rank: int, act: Callable[[], object]) -> None:
    """`act` when that rank gets its first reward of iteration 2."""
    reward = trainer.sampler.reward
    acted: list[bool] = []

    def called(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if trainer.processes.index == rank and trainer.iteration == 2 and not acted:
            acted.append(True)
            act()
        values: torch.Tensor = reward(images, prompts)
        return values

    called.rewards = {"inner": reward}  # type: ignore[attr-defined]
    trainer.sampler.reward = called


def fit(rank: int, out: Path, what: str) -> None:
    """Train; what became of it goes to a file per rank."""
    trainer = made(out, process_timeout=4.0 if what == "freeze" else 60.0)

    def freeze() -> None:
        (out / "frozen").write_text(str(os.getpid()))
        time.sleep(600)  # a reward that does not return

    def fail() -> None:
        raise RuntimeError("this reward is broken")

    acts: dict[str, Callable[[], object]] = {
        "fail": fail,
        "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "freeze": freeze,
        "nothing": lambda: None,
    }
    acting(trainer, 1, acts[what])
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    found: dict[str, Any] = {}
    try:
        trainer.fit()
    except RuntimeError as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    found |= {"interrupted": trainer.interrupted, "iteration": trainer.iteration}
    (out / f"found-{rank}.json").write_text(json.dumps(found))


def found(out: Path, rank: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((out / f"found-{rank}.json").read_text())
    return answer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of two processes that nothing happens to; the trainer is one that looks at its folder."""
    out = tmp_path_factory.mktemp("pair")
    assert ended(started(2, fit, out, "nothing")) == [0, 0]
    return made(out)


def test_two_processes_log_and_learn_what_one_does(pair: Trainer, tmp_path: Path) -> None:
    alone = made(tmp_path)
    acting(alone, 1, lambda: None)
    alone.fit()
    for one, two in zip(rows(alone), rows(pair), strict=True):
        assert one.pop("processes", 1) == 1  # the last look is in a row of its own
        assert two.pop("processes", 2) == 2
        # Sums in another order: float32 of the network, no more.
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    one, two = state(alone), state(pair)
    assert one.keys() >= two.keys()
    assert any(name.startswith("ema.") for name in two)
    for name in two:
        if not name.startswith("source-prior"):  # the main process has the buffers of its own prompts
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert len(json.loads((pair.folder / "manifest.json").read_text())["starts"]) >= 1


def test_a_stop_of_one_is_agreed_on(pair: Trainer, tmp_path: Path) -> None:
    """Both finish the iteration, and none goes into another."""
    assert ended(started(2, fit, tmp_path, "stop")) == [0, 0]
    for rank in (0, 1):
        assert found(tmp_path, rank) == {"interrupted": True, "iteration": 3}
    assert rows(made(tmp_path)) == rows(pair)[:3]


def test_a_failure_of_one_ends_all_and_they_go_on_together(pair: Trainer, tmp_path: Path) -> None:
    assert ended(started(2, fit, tmp_path, "fail")) == [0, 0]
    first, second = (found(tmp_path, rank) for rank in (0, 1))
    assert "Process 1 of 2 has failed; its own message says why" in first["error"]
    assert "this reward is broken" in second["error"]
    assert first["iteration"] == second["iteration"] == 2
    assert ended(started(2, fit, tmp_path, "nothing")) == [0, 0]
    again = made(tmp_path)
    assert rows(again) == rows(pair)
    assert differing(state(again), state(pair)) == []


def frozen(out: Path) -> int:
    """The process that has said so, once its number is written."""
    deadline, said = time.monotonic() + 60, out / "frozen"
    while not (said.is_file() and said.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(said.read_text())


def test_a_frozen_process_is_waited_for_no_longer_than_the_time_out(tmp_path: Path) -> None:
    processes = started(2, fit, tmp_path, "freeze")
    other = frozen(tmp_path)
    processes[0].join(30)
    assert processes[0].exitcode == 0
    assert "did not answer for train.process_timeout 4 seconds" in found(tmp_path, 0)["error"]
    os.kill(other, signal.SIGKILL)
    ended(processes)


def test_a_second_signal_ends_a_process_inside_a_collective(tmp_path: Path) -> None:
    processes = started(2, waiting, tmp_path)
    other = frozen(tmp_path)
    time.sleep(1.0)
    pid = int((tmp_path / "pid-0").read_text())
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)  # the launcher's echo is no second wish
    processes[0].join(2.5)
    assert processes[0].exitcode is None
    os.kill(pid, signal.SIGTERM)
    processes[0].join(5)
    assert processes[0].exitcode == 130
    os.kill(other, signal.SIGKILL)
    ended(processes)


def waiting(rank: int, out: Path) -> None:
    fit(rank, out, "freeze" if rank else "nothing")


def test_going_on_with_another_number_is_said(pair: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = made(pair.folder.parent, iterations=6)
    acting(alone, 1, lambda: None)
    alone.fit()
    assert "written by 2 processes, this run has 1" in caplog.text
    assert [row["iteration"] for row in rows(alone)][-2:] == [5, 6], "iteration 5, and the look after it"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", r"mixed precision 'fp16' would be without effect.*prior\.dtype"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"accumulation over 4 steps.*train\.micro_batch"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"dynamo backend 'INDUCTOR'"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP .* cannot be used"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed .* cannot be used"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM .* cannot be used"),
    ],
)
def test_launch_settings_without_effect_are_refused(variable: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_launch({variable: value})
    check_launch({variable: "1" if value == "4" else "no"})
    check_launch({})


def launched(command: list[str], out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in known} | {"PYTHONPATH": str(ROOT)}
    sizes = ["train.iterations=2", "train.group=4", "train.micro_batch=4", "prompts.list=[a, b]"]
    script = [str(ROOT / "train.py"), str(ROOT / "configs" / "gaussian.yaml"), f"out={out}", *sizes, *overrides]
    return subprocess.run([*command, *script], cwd=out, env=environment, capture_output=True, text=True, timeout=300)


def test_the_documented_command_starts_two_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launched(torchrun, tmp_path, "train.prompts_per_iteration=2")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "gaussian" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["processes"] for line in lines] == [2, 2]
    assert len(json.loads((tmp_path / "gaussian" / "manifest.json").read_text())["starts"]) == 1
    # torch says so where a process ends inside its group, whose threads may then abort it.
    assert "destroy_process_group" not in done.stderr


def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    done = launched(accelerate, tmp_path, "train.prompts_per_iteration=2")
    assert done.returncode != 0
    assert "started one, which is what it does on CPUs" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
    assert not (tmp_path / "gaussian").exists()
