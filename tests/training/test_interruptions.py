"""A run that fails or is stopped anywhere goes on, when it is started again, with the numbers of one that was not, exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import BETA, QUADRATIC, differing, rows, run, state

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

RUNS: dict[str, dict[str, Any]] = {
    "two updates, a buffer that is refreshed, replay": {
        "objective": {"component": "rtb", "log_z": "per_prompt"},
        "behaviours": [
            {"component": "on_policy", "exploration": 0.3, "until": 3},
            {"component": "prior_buffer", "share": 0.25, "capacity": 6, "refresh": 1},
            {"component": "replay", "share": 0.25},
        ],
        "train": {"updates_per_iteration": 2},
    },
    "a value that is warmed up once": {
        "objective": {
            "component": "trust_pcl",
            "length": 1,
            "value_loss": "none",
            "warm_up_updates": 3,
            "width": 4,
        },
        "behaviours": [{"component": "prior_buffer", "capacity": 6}],
        "train": {"updates_per_iteration": 2},
    },
    "statistics that never stay, a value that learns": {
        "objective": {"component": "trust_pcl", "length": 2, "warm_up_updates": 3, "width": 4},
        "behaviours": [{"component": "prior_buffer", "capacity": 6}],
        "beta": {"value": BETA, "kl_budget": {"nats": 1.0, "rate": 0.3}},
        "standardise": None,
    },
    "statistics of the prior, a pool, a value": {
        "objective": {
            "component": "trust_pcl",
            "length": 2,
            "warm_up_updates": 3,
            "warm_up_states": "recorded",
            "width": 4,
        },
        "behaviours": [
            {"component": "prior_buffer", "share": 0.25, "capacity": 6},
            {"component": "back_and_forth", "share": 0.25},
        ],
        "standardise": 9,
    },
}
SIZES = {"iterations": 3, "prompts_per_iteration": 2, "group": 4, "micro_batch": 4}


def made(out: Path, name: str) -> Trainer:
    sections = dict(RUNS[name])
    density = {"component": "density", "density": QUADRATIC}
    reward = density
    if "standardise" in sections:
        reward = {"component": "standardise", "reward": density, "samples": sections.pop("standardise")}
    return run(
        out,
        **sections | {"train": SIZES | sections.get("train", {}), "prompts": {"list": ["a", "b", "c"]}},
        reward=reward,
    )


def at_call(trainer: Trainer, number: int, act: Callable[[], object]) -> list[int]:
    """`act` in the network's call of that number, whatever it is called for; the number of calls so far is in the answer."""
    count = [0]

    def called(*_: Any) -> None:
        count[0] += 1
        if count[0] == number:
            act()

    trainer.prior.pipe.denoiser.register_forward_pre_hook(called)
    return count


def fail() -> None:
    raise RuntimeError("out of memory")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True, scope="module")
def few_first_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewards.standardise.FIRST_SAMPLES", 8)
        yield


@pytest.fixture(scope="module", params=RUNS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Trainer, int]:
    trainer = made(tmp_path_factory.mktemp("whole"), request.param)
    count = at_call(trainer, -1, fail)
    trainer.fit()
    return request.param, trainer, count[0]


@pytest.mark.parametrize("act", [fail, stop])
def test_wherever_it_ends_it_goes_on_as_if_it_had_not(
    whole: tuple[str, Trainer, int], act: Callable[[], object], tmp_path: Path
) -> None:
    name, expected, calls = whole
    for number in range(1 if act is fail else 3, calls + 1, max(1, calls // 4)):
        out = tmp_path / str(number)
        first = made(out, name)
        at_call(first, number, act)
        with pytest.raises(RuntimeError, match="out of memory") if act is fail else nullcontext():
            first.fit()
        again = made(out, name)
        again.fit()
        assert rows(again) == rows(expected), f"call {number} of {calls}, after {first.iteration} iterations"
        assert differing(state(again), state(expected)) == []


def test_a_stop_in_the_warm_up_is_followed_at_once(tmp_path: Path) -> None:
    trainer = made(tmp_path, "a value that is warmed up once")
    calls = at_call(trainer, 2, stop)
    trainer.fit()
    assert trainer.interrupted
    assert trainer.iteration == 0
    assert calls[0] == 4, "the micro-batch that was being drawn, and none after it"
    assert not trainer.warmed


def test_a_run_that_reached_its_end_was_not_interrupted(tmp_path: Path) -> None:
    trainer = made(tmp_path, "a value that is warmed up once")
    reward = trainer.sampler.reward

    def stopping(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if trainer.iteration == SIZES["iterations"] - 1 and not trainer.interrupted:
            stop()
        values: torch.Tensor = reward(images, prompts)
        return values

    trainer.sampler.reward = stopping
    trainer.fit()
    assert trainer.iteration == SIZES["iterations"]
    assert not trainer.interrupted


def test_a_failure_before_anything_was_learned_leaves_no_checkpoint(tmp_path: Path) -> None:
    trainer = made(tmp_path, "two updates, a buffer that is refreshed, replay")
    at_call(trainer, 3, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    assert not list((trainer.folder / "checkpoints").glob("*"))
