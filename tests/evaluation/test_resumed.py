"""A partial evaluation goes on where it was: no batch is measured twice, and the files are those of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import green

FILES = ("metrics.json", "samples.safetensors", "pictures.json", "side_by_side.png")

JUDGE = "tests.evaluation.test_resumed:counting"

calls: list[int] = []
last: list[int] = []


def counting(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A judge that is interrupted at its n-th call, n being the last of `last`."""
    if last and len(calls) == last[-1]:
        raise KeyboardInterrupt
    calls.append(len(images))
    return -green(images, prompts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resumed")
    data = {
        "name": "small", "out": str(out), "beta": 1.0,
        "prior": {"component": "tests.oracles.pixel:PixelPrior"}, "reward": {"component": "tests.oracles.pixel:green"},
        "prompts": {"list": ["one", "two"]},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
        "eval": {
            "samples": 5, "prior_samples": 6, "bootstrap": 10, "batch": 4,
            "embedder": {"component": "tests.oracles.pixel:Signs"},
            "factors": [{"name": "sign", "classes": ["-", "+"]}],
        },
    }  # fmt: skip
    assemble(RunConfig.model_validate(data)).fit()
    return out / "small"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    calls.clear()
    last.clear()


def written(run: Path) -> list[bytes]:
    return [(run / "eval" / name).read_bytes() for name in FILES]


def interrupted(run: Path, at: int) -> None:
    last.append(at)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, judges=[JUDGE])
    last.clear()


@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(
    run: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(run, judges=[JUDGE])
    whole = written(run)
    assert calls == [4, 4, 4, 4, 4, 2]
    calls.clear()
    interrupted(run, at)
    assert "is kept in" in capsys.readouterr().err.replace("\n", " ")
    for name in FILES:
        (run / "eval" / name).unlink()
    calls.clear()
    evaluate_run(run, judges=[JUDGE])
    assert calls == [4, 4, 4, 4, 4, 2][at:]
    assert written(run) == whole
    assert not (run / "eval" / "unfinished").exists()


def test_other_settings_start_anew_and_say_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(run, 2)
    calls.clear()
    evaluate_run(run, ["eval.samples=3"], judges=[JUDGE])
    assert "other settings (eval.*): this one starts anew" in capsys.readouterr().err.replace("\n", " ")
    assert sum(calls) == 2 * (6 + 3)


def test_another_batch_size_goes_on(run: Path) -> None:
    interrupted(run, 1)
    calls.clear()
    evaluate_run(run, ["eval.batch=8"], judges=[JUDGE])
    assert sum(calls) == 2 * (6 + 5) - 4


def test_a_damaged_part_is_measured_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(run, 3)
    part = run / "eval" / "unfinished" / "prior-00000004.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    calls.clear()
    evaluate_run(run, judges=[JUDGE])
    assert "prior-00000004.safetensors is damaged" in capsys.readouterr().err.replace("\n", "")
    assert calls == [4, 4, 4, 4, 2]
