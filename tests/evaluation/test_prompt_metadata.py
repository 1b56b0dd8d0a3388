"""Further columns of the prompts reach the judges and metrics that ask for them: of runs, of some prompts of a run, of folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from diffusion_rtb.cli.main import eval_main
from diffusion_rtb.config.load import EvalConfig, load_config
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.training.assemble import assemble

HERE = "tests.evaluation.test_prompt_metadata"
LIFTS = {"a cat": 1.0, "a dog": 20.0, "a fish": 300.0}


class Lifted:
    """Brightness, and what the prompt's column `lift` says."""

    metadata = ("lift",)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return dark(images, prompts) + torch.tensor([float(row["lift"]) for row in metadata])


def dark(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


class Lift(Metric):
    """The mean of the column `lift` in three ways: as told before, and with the pictures of each side."""

    name, needs = "lift", None

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        self.told = {prompt: row["lift"] for prompt, row in zip(prompts, metadata, strict=True)}

    def scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        assert [row["lift"] for row in metadata] == [self.told[prompt] for prompt in prompts]
        return {"seen": torch.tensor([float(row["lift"]) for row in metadata])}

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> list[float]:
        return [float(seen.mean()) for side in (prior, posterior) if (seen := self.kept(side, "seen")) is not None]


ASKED = ["--judges", f"{HERE}:Lifted", f"{HERE}:dark"]
SMALL = ["eval.bootstrap=5", f"eval.metrics=[judges, {{component: '{HERE}:Lift'}}]", "eval.batch=2"]


def evaluated(path: Path, *more: str) -> dict[str, dict[str, Any]]:
    """Row of metrics.json by prompt."""
    with pytest.raises(SystemExit) as left:
        eval_main([str(path), *more, *ASKED, "--out", "out", *SMALL])
    assert not left.value.code
    return {row["prompt"]: row for row in json.loads(Path("out/metrics.json").read_text())["per_prompt"]}


def lift_of_judge(row: dict[str, Any], side: str) -> float:
    lifted, plain = (row["judges"][f"{HERE}:{name}"][side]["mean"] for name in ("Lifted", "dark"))
    return float(lifted - plain)


def test_of_some_prompts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": prompt, "lift": lift}) for prompt, lift in LIFTS.items()]
    Path("prompts.jsonl").write_text("\n".join(lines))
    data = {
        "name": "told", "beta": 1.0, "prompts": {"file": "prompts.jsonl"},
        "prior": {"component": "tests.oracles.pixel:PixelPrior"}, "reward": {"component": "tests.oracles.pixel:green"},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
        "eval": {"samples": 3, "prior_samples": 3},
    }  # fmt: skip
    Path("told.yaml").write_text(yaml.safe_dump(data))
    assemble(load_config(Path("told.yaml"))).fit()
    found = evaluated(Path("runs/told"), "eval.prompts=[a dog, a fish]")
    assert list(found) == ["a dog", "a fish"]
    for prompt, row in found.items():
        assert row["lift"] == [LIFTS[prompt]] * 2
        for side in ("prior", "posterior"):
            assert lift_of_judge(row, side) == pytest.approx(LIFTS[prompt], rel=1e-5)


def test_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, lines = tmp_path / "theirs", []
    folder.mkdir()
    for number, prompt in enumerate([*LIFTS, *LIFTS]):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": prompt, "lift": LIFTS[prompt]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for prompt, row in evaluated(folder, "--reward", "jpeg").items():
        assert row["lift"] == [LIFTS[prompt]]
        assert lift_of_judge(row, "posterior") == pytest.approx(LIFTS[prompt], rel=1e-5)
