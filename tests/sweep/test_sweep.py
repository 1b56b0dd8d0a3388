"""A sweep of the Gaussian prior under a linear reward, whose posterior the correction can become: its frontier is a parabola."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from diffusion_rtb.cli.main import app
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import load_config
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.exact import exact_target
from diffusion_rtb.run.folder import RunFolderError
from diffusion_rtb.run.metrics_file import read_rows
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.sweep.plan import Plan, plan
from diffusion_rtb.sweep.run import Found, run
from diffusion_rtb.sweep.table import legend, table, write_table
from diffusion_rtb.training.assemble import assemble

BETAS = (0.5, 1.0)


def config(out: Path, reward: dict[str, Any]) -> Path:
    path = out / "line.yaml"
    text = {
        "out": str(out),
        "prior": {"component": "gaussian", "mean": [0.0], "covariance": 1.0, "steps": 5},
        "reward": reward,
        "beta": 1.0,
        "objective": {"component": "rtb", "log_z": "vargrad"},
        "prompts": {"list": [""]},
        "train": {
            "iterations": 30,
            "prompts_per_iteration": 1,
            "group": 32,
            "micro_batch": 32,
            "lr": 0.15,
            "grad_clip": 100.0,
            "checkpoint_every": 15,
            "grid_every": 0,
        },
        "eval": {
            "samples": 400,
            "prior_samples": 400,
            "batch": 400,
            "bootstrap": 20,
            "metrics": ["reward", "kl", "ess"],
        },
    }
    path.write_text(json.dumps(text))
    return path


LINE = {"component": "density", "density": {"linear": [1.0]}}


pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Found, list[str]]:
    told: list[str] = []
    work = plan(config(tmp_path_factory.mktemp("sweep"), LINE), ["beta=1.0,0.5"])
    return work, run(work, told.append, evaluate_run), told


def test_the_points_follow_the_closed_form(swept: tuple[Plan, Found, list[str]]) -> None:
    """r = x under N(0, v): reward beta·v, KL = log Z = beta²·v/2."""
    work, found, _ = swept
    rows = [row for row in found.rows if row["kind"] == "posterior"]
    assert [row["name"] for row in rows] == ["line-beta-0.5", "line-beta-1.0"]
    target = exact_target(build(work.config.prior, "prior"), build(work.config.reward, "reward"), 1.0)
    v = 2 * target.log_z
    for row, beta in zip(rows, BETAS, strict=True):
        # 400 samples: one standard error of the reward is 0.05, of the KL 0.05·beta.
        assert row["beta"] == beta
        assert row["reward"]["mean"] == pytest.approx(beta * v, abs=0.15)
        assert row["kl"] == pytest.approx(beta**2 * v / 2, abs=0.15 * beta)
        assert row["reward_reweighted"] == pytest.approx(beta * v, abs=0.2)
    stops = [row for row in found.rows if row["kind"] == "early stop"]
    assert [row["iterations"] for row in stops] == [3, 7, 11, 15, 18, 22, 26, 30]
    assert stops[-1]["reward"]["mean"] > stops[0]["reward"]["mean"] + 1  # nothing holds it
    assert found.rows[-1]["kind"] == "baseline"
    # For its KL nothing has more reward than the exact posterior, sqrt(2·KL·v).
    for row in found.rows:
        assert row["reward"]["mean"] <= (2 * max(row["kl"], 0) * v) ** 0.5 + 0.3
    assert all(row["frontier_kl"] for row in rows)
    assert all(row["frontier_vendi"] is None for row in found.rows)


def test_each_point_is_an_ordinary_run(swept: tuple[Plan, Found, list[str]]) -> None:
    work, found, _ = swept
    trained = open_trained_run(found.folders[1])
    assert (trained.progress.beta, trained.progress.done) == (1.0, 30)
    sheet = json.loads((work.folder / "sweep.json").read_text())
    assert sheet["axes"] == {"beta": [0.5, 1.0]}
    assert sheet["points"] == found.rows
    assert sheet["failed"] == {}
    baseline = [path.name for path in sorted((Path(found.rows[-1]["folder"]) / "checkpoints").glob("0*"))]
    assert baseline == ["00000015", "00000030"]


def test_it_is_shown_on_one_page(swept: tuple[Plan, Found, list[str]]) -> None:
    _, found, _ = swept
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(found))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "beta-0.5" in line)
    assert f"{found.rows[0]['reward']['mean']:.2f} ±" in row
    assert "KL │" in row
    assert any(line.startswith("│ ddpo at 30 ") for line in lines)
    assert any("no other point has as much reward for less KL" in line for line in legend(found))
    assert "| beta-1.0 | 1 |" in write_table(found).read_text()


def test_the_command_writes_the_page(swept: tuple[Plan, Found, list[str]]) -> None:
    work, found, _ = swept
    done = CliRunner().invoke(app, ["sweep", str(Path(work.config.out, "line.yaml")), "beta=0.5,1.0"])
    assert done.exit_code == 0
    assert "2/2: beta-1.0 is finished" in done.stderr
    assert "exact" in done.stdout
    page = (work.folder / "index.html").read_text()
    assert all(row["name"] in page for row in found.rows)
    assert "Reward and its price" in page


def test_again_repeats_nothing(swept: tuple[Plan, Found, list[str]]) -> None:
    work, found, told = swept
    assert any("evaluating" in line for line in told)
    files = [Path(row["folder"], "eval", "metrics.json") for row in found.rows if row["kind"] != "early stop"]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[0].unlink()  # the evaluation was interrupted
    again: list[str] = []
    assert run(work, again.append, evaluate_run).rows == found.rows
    assert again == [
        f"1/2: beta-0.5: evaluating {found.folders[0]}",
        "2/2: beta-1.0 is finished",
        "baseline: ddpo is finished",
    ]
    assert files[0].read_bytes() == before[files[0]][0]
    assert all(file.stat().st_mtime_ns == before[file][1] for file in files[1:])


def test_an_interrupted_point_goes_on_with_the_same_numbers(
    swept: tuple[Plan, Found, list[str]], tmp_path: Path
) -> None:
    _, whole, _ = swept
    shutil.copytree(whole.folders[1], tmp_path / "line-beta-1.0")  # of two points one is there
    work = plan(config(tmp_path, LINE), ["beta=0.5,1.0"], baseline=None)
    first = work.configs[0]
    train = first.train.model_copy(update={"iterations": 7})
    assemble(first.model_copy(update={"train": train})).fit()
    found = run(work, lambda _: None, evaluate_run)
    for row, other in zip(found.rows, whole.rows, strict=False):
        assert (row["reward"], row["kl"]) == (other["reward"], other["kl"])


def test_a_warm_start_is_said_and_kept(swept: tuple[Plan, Found, list[str]]) -> None:
    work, _, _ = swept
    told: list[str] = []
    path = Path(work.config.out, "line.yaml")
    warm = plan(path, ["beta=0.5,1.0,1.5"], warm_start=True, warm_iterations=5, baseline=None)
    found = run(warm, told.append, evaluate_run)
    assert told[0] == "1/3: beta-0.5 is finished"
    assert [row["start"] for row in found.rows] == [
        None,
        None,
        "line-beta-1.0",
    ]  # those that had begun stay as they are
    assert found.rows[2]["iterations"] == 5
    assert any("Started from another posterior: line-beta-1.5 from line-beta-1.0." in line for line in legend(found))
    held = load_config(found.folders[2])
    assert held.start == str(found.folders[1])
    first_row = read_rows(found.folders[2] / "metrics.jsonl")[0][0]
    assert first_row["reward"] == pytest.approx(1.0, abs=0.6)  # of beta 1, by 32 samples
    # It keeps its start, and what it has learned, whatever is asked for.
    for place, done, iterations in ((2, (), 30), (1, (0,), 30)):
        asked = plan(path, ["beta=0.5,1.0,1.5"], baseline=None).settled(place, done)
        assert (asked.start, asked.train.iterations) == (found.rows[place]["start"] and held.start, iterations)
    less = plan(path, ["beta=0.5,1.0,1.5"], warm_start=True, warm_iterations=3)
    assert less.settled(2, [0, 1]).train.iterations == 5


def test_another_run_in_a_points_folder_is_refused(swept: tuple[Plan, Found, list[str]]) -> None:
    work, _, _ = swept
    with pytest.raises(
        RunFolderError, match=r"line-beta-0.5 already holds a run with another config.\n  train.lr: 0.15 there"
    ):
        plan(Path(work.config.out, "line.yaml"), ["beta=0.5,1.0", "train.lr=0.2"])


class Touchy:
    """x, times a factor; it fails at the factor 2 until a file says that it was mended."""

    def __init__(self, factor: float, mended: str) -> None:
        self.factor, self.mended = factor, Path(mended)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.factor == 2 and not self.mended.exists():
            raise RuntimeError("no answer today")
        return self.factor * images[:, 0].float()


def test_a_point_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    reward = {"component": f"{__name__}:Touchy", "mended": str(tmp_path / "mended")}
    small = ["train.iterations=2", "eval.samples=8", "eval.prior_samples=8", "reward.factor=1,2,3"]
    work = plan(config(tmp_path, reward), small, baseline=None)
    told: list[str] = []
    found = run(work, told.append, evaluate_run)
    assert [row["name"] for row in found.rows] == ["line-factor-1", "line-factor-3"]
    assert list(found.failed) == ["line-factor-2"]
    assert "no answer today" in found.failed["line-factor-2"]
    text = "\n".join(legend(found))
    assert "line-factor-2 failed: RewardError" in text
    assert "The same command tries the failed ones again" in text
    assert "reward.factor changes what is measured" in text
    assert all(row["frontier_kl"] is None for row in found.rows)
    (tmp_path / "mended").touch()
    again = run(work, told.append, evaluate_run)
    assert [row["name"] for row in again.rows] == ["line-factor-1", "line-factor-2", "line-factor-3"]
    assert again.failed == {}
    assert told[-4] == "1/3: factor-1 is finished"
    assert told[-1] == "3/3: factor-3 is finished"
