"""`python train.py configs/gaussian.yaml && python eval.py runs/gaussian`, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusion_rtb.cli.main import main

ROOT = Path(__file__).parents[2]


def test_only_pictures_that_were_drawn_are_pointed_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"out={tmp_path}", "train.iterations=1", "train.group=8", "train.micro_batch=8"]
    for name, every in (("none", 0), ("some", 1)):
        command = [
            "train",
            str(ROOT / "configs" / "gaussian.yaml"),
            *small,
            f"name={name}",
            f"train.grid_every={every}",
        ]
        assert left_with(command) == 0
        assert (f"pictures in {tmp_path / name / 'samples'}" in capsys.readouterr().err) == (every > 0)


def left_with(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(argv)
    return int(left.value.code or 0)


@pytest.mark.parametrize("name", ["gaussian", "gmm25"])
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_prior_of_vectors_goes_through_the_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["train.iterations=2", "train.group=8", "train.micro_batch=8", "train.grid_every=1"]
    assert (
        left_with(
            [
                "train",
                str(ROOT / "configs" / f"{name}.yaml"),
                *small,
                "behaviours=[{component: prior_buffer, capacity: 8}]",
            ]
        )
        == 0
    )
    run = Path("runs", name)
    assert (run / "lora" / "model_index.json").is_file()
    card = (run / "lora" / "README.md").read_text()
    assert "Trained corrections that turn" in card
    assert "text-to-image" not in card
    assert "LoRA rank, alpha | – |" in card
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert left_with(["eval", str(run), "eval.samples=200", "eval.prior_samples=200", "eval.bootstrap=10"]) == 0
    assert json.loads((run / "eval" / "metrics.json").read_text())["samples"] == {"prior": 200, "posterior": 200}
    assert Image.open(run / "eval" / "side_by_side.png").width > 500
    assert left_with(["sample", str(run), "-n", "1"]) == 1
    assert "is no picture" in capsys.readouterr().err
