"""Comparisons where nobody knows the posterior: the prior's samples, re-weighted, are the truth. Here it is known all the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_rtb.cli.main import main
from diffusion_rtb.comparison.cost import Budget
from diffusion_rtb.comparison.files import read_lines
from diffusion_rtb.comparison.plan import truth_of
from diffusion_rtb.comparison.truths.reweighted import ReweightedTruth
from diffusion_rtb.config.load import load_config
from pipelines.gmm import GMM

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

CONFIG = """
prior: {component: 'tests.comparison.test_reweighted:Hidden', means: &means [[-2.0, 1.0], [2.0, 0.0]], variance: 0.3,
        weights: [0.4, 0.6], steps: 6, width: 8, layers: 1, frequencies: 2}
reward:
  component: density
  density: {means: *means, variance: 0.3, weights: [0.85, 0.15]}
  minus: {means: *means, variance: 0.3, weights: [0.4, 0.6]}
beta: 1.0
objective: {component: rtb, log_z: learned}
behaviours: [{component: prior_buffer, share: 0.25, capacity: 16}]
prompts: {list: [""]}
train: {iterations: 6, prompts_per_iteration: 1, group: 16, micro_batch: 16, checkpoint_every: 2, grid_every: 0}
eval:
  samples: 300
  prior_samples: 600
  batch: 300
  factors: [{name: side, classes: [left, right]}]
  labeller: {component: 'tests.comparison.test_reweighted:Side'}
  embedder: {component: 'tests.comparison.test_reweighted:Side'}
"""


class Hidden(GMM):
    """A mixture that does not say what its posterior is."""

    exact_target = None  # type: ignore[assignment]


class Side:
    """Left or right of 0."""

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """Logits."""
        return torch.stack([-images[:, 0], images[:, 0]], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """The vectors, away from 0."""
        return images + 10


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, as the working directory."""
    (tmp_path / "hidden.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(*argv: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["compare", "hidden.yaml", "--seeds", "1", *argv])
    return int(left.value.code or 0)


def lines(folder: Path) -> dict[str, dict[str, float]]:
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("objective", "behaviour")
    return {row["objective"]: {k: float(v) for k, v in row.items() if v and k not in names} for row in rows}


def test_the_reweighted_prior_is_the_truth(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--objectives", "config", "ddpo", "--points", "2", "--point-samples", "40") == 0
    said = capsys.readouterr()
    folder = project / "runs" / "hidden-compare"
    assert said.out == (folder / "table.md").read_text()
    assert "ddpo with config is left out: objective DDPO is on-policy" in said.err
    found = lines(folder)
    assert list(found) == ["truth", "prior", "config"]
    # The reward is log p*/p of two far modes with log Z 0: E[r] and the KL of the exact posterior are the same number.
    exact = 0.85 * torch.tensor(0.85 / 0.4).log() + 0.15 * torch.tensor(0.15 / 0.6).log()
    truth, prior, trained = found.values()
    assert truth["reward"] == pytest.approx(float(exact), abs=0.1)
    assert truth["kl"] == pytest.approx(float(exact), abs=0.1)
    assert truth["elbo_gap"] == 0
    assert prior["kl"] == 0
    assert prior["tv"] == pytest.approx(0.45, abs=0.06)
    assert prior["elbo"] == prior["reward"] < trained["reward"] + 0.3
    assert {"tv", "vendi", "distance", "strength", "ess", "elbo_gap", "network_calls", "memory"} <= trained.keys()
    assert not {"w2", "off_percent"} & trained.keys()
    assert Image.open(folder / "figure.png").width > 600
    assert "600 samples of the prior for each prompt" in said.out
    curve = read_lines(folder / "runs" / "config.config.0" / "curve.jsonl")
    assert [point["iteration"] for point in curve] == [0, 3]
    assert {"tv", "elbo", "kl", "reward", "seconds", "network_calls", "reward_calls"} <= curve[0].keys()
    # Given again: neither the prior nor a run is drawn once more.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert compare("--objectives", "config", "--points", "2", "--point-samples", "40") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_a_run_ends_with_its_budget(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """96 calls for 16 trajectories of the prior, then 456 for each iteration."""
    argv = ["--budget", "network_calls=1000", "--clock", "network_calls", "--points", "0"]
    assert compare(*argv) == 0
    run = project / "runs" / "hidden-compare" / "runs" / "config.config.0"
    found = json.loads((run / "measures.json").read_text())
    assert (found["iterations"], found["network_calls"], found["reward_calls"]) == (2, 96 + 2 * 456, 16 + 2 * 12)
    assert "reached 1,000 network calls" in capsys.readouterr().out
    starts = (run / "manifest.json").read_text()
    assert compare(*argv) == 0
    assert (run / "manifest.json").read_text() == starts
    assert compare(*argv[2:]) == 1
    assert "budget" in capsys.readouterr().err


def test_the_truth_has_the_prompts_and_numbers_of_the_evaluation(project: Path) -> None:
    truth = truth_of(load_config(project / "hidden.yaml", ["eval.samples=40"]))
    assert isinstance(truth, ReweightedTruth)
    assert (truth.defaults.samples, truth.defaults.point_samples) == (40, 5)


@pytest.mark.parametrize("text", ["", "seconds", "seconds=", "seconds=x", "seconds=0", "seconds=inf", "hours=2", "=3"])
def test_a_budget_is_a_positive_number_of_a_cost(text: str) -> None:
    with pytest.raises(ValueError, match="A budget is one of seconds, cpu_seconds, network_calls, reward_calls"):
        Budget.of(text)


def test_a_budget_as_it_is_written() -> None:
    assert Budget.of("network_calls=2e5") == Budget("network_calls", 200_000)
