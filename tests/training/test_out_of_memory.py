"""Out of memory, whatever says it and wherever: one sentence on where, the settings that help, and a run that goes on with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from diffusion_rtb.cli.main import app
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.out_of_memory import OutOfMemoryError, is_out_of_memory, smaller_settings
from diffusion_rtb.training.trainer import Trainer
from pipelines._analytic.prior import VectorPrior
from tests.oracles.behaving import rows, run

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB.\nIf reserved is large ..."
)
SIZES = {"iterations": 3, "group": 8, "micro_batch": 8}


def cuda(*_: Any) -> None:
    raise torch.OutOfMemoryError(CUDA)


def mps(*_: Any) -> None:
    raise RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.5 GB, other allocations: 1 GB, max allowed: 18.1 GB)."
    )


def host(*_: Any) -> None:
    torch.empty(2**62, dtype=torch.uint8)


def from_call(trainer: Trainer, number: int, act: Callable[..., None]) -> None:
    """`act` in the network's call of that number."""
    calls = iter(range(1, 10**6))
    trainer.prior.pipe.denoiser.register_forward_pre_hook(lambda *_: act() if next(calls) == number else None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that had all the memory it wanted."""
    trainer = run(tmp_path_factory.mktemp("whole"), train=SIZES)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("act", "call", "doing"),
    [(cuda, 1, "drawing trajectories"), (mps, 5, "scoring trajectories"), (host, 9, "taking the gradient")],
)
def test_a_run_says_where_and_goes_on_with_half_the_micro_batch(
    act: Callable[..., None], call: int, doing: str, tmp_path: Path, whole: Trainer
) -> None:
    """An iteration of this run has 12 network calls: 4 steps drawn, scored under the prior, and differentiated."""
    trainer = run(tmp_path, train=SIZES)
    from_call(trainer, 12 + call, act)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit()
    said = str(caught.value)
    assert said.startswith(f"Out of memory while {doing} (")
    assert "train.micro_batch=4 (it is 8)" in said
    assert "Iterations done, 1, are kept" in said

    again = run(tmp_path, train=SIZES | {"micro_batch": 4})
    again.fit()
    assert_close(rows(again), rows(whole), rtol=1e-6, atol=1e-6)


def test_what_the_failed_calls_held_is_let_go_of_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the device is as full while the state before the iteration is put back on it."""
    trainer = run(tmp_path, train=SIZES)
    held: list[weakref.ref[Tensor]] = []
    left: list[bool] = []

    def fails() -> None:
        activation = torch.zeros(10)
        held.append(weakref.ref(activation))
        cuda()

    from_call(trainer, 20, fails)
    save = trainer.save

    def saves() -> None:
        left.append(held[0]() is not None)
        save()

    monkeypatch.setattr(trainer, "save", saves)
    with pytest.raises(OutOfMemoryError):
        trainer.fit()
    assert left[0] is False


def test_of_a_reward_decoder_and_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path / "a", train=SIZES)
    trainer.sampler.reward = cuda  # type: ignore[assignment]
    with pytest.raises(OutOfMemoryError, match="while computing rewards"):
        trainer.fit()
    trainer = run(tmp_path / "b", train=SIZES)
    trainer.optimizer.register_step_pre_hook(cuda)
    with pytest.raises(OutOfMemoryError, match="while updating the parameters"):
        trainer.fit()
    trainer = run(tmp_path / "c", train=SIZES)
    monkeypatch.setattr(VectorPrior, "decode", cuda)
    with pytest.raises(OutOfMemoryError, match="while decoding samples"):
        trainer.fit()


def test_eval_and_sample_name_their_own_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, train=SIZES | {"iterations": 1}, eval={"batch": 6, "samples": 8, "prior_samples": 8})
    trainer.fit()
    monkeypatch.setattr(VectorPrior, "decode", cuda)
    with pytest.raises(OutOfMemoryError, match=r"while decoding samples .*\n  eval\.batch=3 \(it is 6\)"):
        evaluate_run(trainer.folder)
    sample = ["sample", str(trainer.folder), "-n", "2", "--out", str(tmp_path / "pictures")]
    for given, said in (([], "--batch=3 (it is 6)"), (["--batch", "4"], "--batch=2 (it is 4)")):
        answer = CliRunner().invoke(app, [*sample, *given])
        assert answer.exit_code == 1
        assert said in answer.output
    with monkeypatch.context() as patch:
        patch.setattr(VectorPrior, "load_weights", lambda self: cuda())
        assert "Out of memory while loading the prior" in CliRunner().invoke(app, sample).output


def test_the_settings_are_those_that_are_left() -> None:
    data: dict[str, Any] = {
        "name": "x",
        "prior": {"component": "stable_diffusion", "decode_batch": 8},
        "reward": {"component": "jpeg"},
        "beta": 1.0,
        "prompts": {"list": ["a", "b", "c"]},
        "train": {"prompts_per_iteration": 3, "group": 4, "micro_batch": 12},
    }
    found = smaller_settings(RunConfig.model_validate(data), "train")
    assert found[0].startswith("train.micro_batch=6 (it is 12)")
    assert any(line.startswith("prior.decode_batch=4 (it is 8)") for line in found)
    data |= {"prior": {"component": "stable_diffusion", "decode_batch": 1}}
    data["train"] |= {"micro_batch": 3}
    found = smaller_settings(RunConfig.model_validate(data), "train")
    assert found[0].startswith("train.micro_batch=1 (it is 3)")
    assert not any("decode_batch" in line for line in found)


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("Expected all tensors to be on the same device"))
    assert not is_out_of_memory(ValueError("the shop is out of memory cards"))
    trainer = run(tmp_path, train=SIZES)

    def fails(images: Tensor, prompts: list[str]) -> Tensor:
        raise ZeroDivisionError("0")

    trainer.sampler.reward = fails  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="raised ZeroDivisionError") as caught:
        trainer.fit()
    assert not isinstance(caught.value, OutOfMemoryError)
