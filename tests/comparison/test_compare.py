"""The command `compare`: names, a grid of real runs on a small mixture, interruptions, and what is refused beforehand."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusion_rtb.cli.compare import CompareCommand
from diffusion_rtb.cli.main import main
from diffusion_rtb.comparison.cell import timed
from diffusion_rtb.comparison.clock import Clock
from diffusion_rtb.comparison.files import read_lines
from diffusion_rtb.comparison.plan import truth_of
from diffusion_rtb.comparison.truths.truth import Looks
from diffusion_rtb.comparison.variants import AS_CONFIGURED, cells, load_variants
from diffusion_rtb.config.load import ConfigError, RunConfig, config_diff, load_config
from diffusion_rtb.run import checkpoint
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.observers import Observer
from diffusion_rtb.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

CONFIG = """
prior: {component: gmm, means: &means [[-2.0, 1.0], [2.0, 0.0]], variance: 0.3, weights: [0.4, 0.6],
        steps: 6, width: 8, layers: 1, frequencies: 2}
reward:
  component: density
  density: {means: *means, variance: 0.3, weights: [0.85, 0.15]}
  minus: {means: *means, variance: 0.3, weights: [0.4, 0.6]}
beta: 1.0
objective: {component: rtb, log_z: learned}
behaviours: [{component: prior_buffer, share: 0.5, capacity: 32}]
prompts: {list: [""]}
train: {iterations: 6, prompts_per_iteration: 1, group: 16, micro_batch: 16, checkpoint_every: 2, grid_every: 0}
"""

VARIANTS = """
objectives:
  pieces: {objective: {component: trust_pcl, length: 3}, train: {lr: 0.002, lr_objective: 0.02}}
behaviours:
  mixed: {behaviours: [{component: prior_buffer, share: 0.25, capacity: 16}]}
  noisy: {behaviours: [{component: on_policy, exploration: 0.5, until: 4}]}
"""

LEARNING = "reward={component: standardise, reward: {component: brightness}}"
QUICK = ["--samples", "60", "--points", "3", "--point-samples", "20"]
GRID = ["--objectives", "vargrad", "pieces", "--behaviours", "mixed", "config", "--seeds", "1"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and its variants, as the working directory."""
    (tmp_path / "compare").mkdir()
    (tmp_path / "two.yaml").write_text(CONFIG)
    (tmp_path / "compare" / "two.yaml").write_text(VARIANTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left_with(argv: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(["compare", *argv])
    return int(left.value.code or 0)


def starts(run: Path) -> int:
    """How often a run was opened."""
    return len(json.loads((run / "manifest.json").read_text())["starts"])


def numbers(folder: Path) -> list[dict[str, str]]:
    """runs.csv without what depends on clock and machine."""
    with (folder / "runs.csv").open() as file:
        return [{k: v for k, v in row.items() if "seconds" not in k and k != "memory"} for row in csv.DictReader(file)]


def test_names_of_every_kind_make_configs_that_can_be_built(project: Path) -> None:
    config = project / "two.yaml"
    variants = load_variants(config)
    objectives = [
        "rtb",
        "pieces",
        *variants.objectives,
        "trust_pcl",
        "ddpo",
        "dpok",
        "grpo",
        "reinforce_naive",
        "config",
    ]
    grid = cells(config, variants, list(dict.fromkeys(objectives)), ["on_policy"], 1)
    grid += cells(config, variants, ["rtb", "pieces", "config"], ["on_policy", "mixed", "noisy", "config"], 1)
    for cell in grid:
        describe_components(cell.config)
    by_pair = {cell.pair: cell.config for cell in grid}
    base = load_config(config)
    assert by_pair["config", "config"].model_copy(update={"name": base.name, "out": base.out}) == base
    assert by_pair["rtb", "config"].objective.model_dump() == {"component": "rtb"}
    # A variant's behaviour has nothing left of the config's own; of `train` it changes single keys.
    assert [behaviour.component for behaviour in by_pair["rtb", "noisy"].behaviours] == ["on_policy"]
    assert by_pair["rtb", "on_policy"].behaviours == ()
    found = config_diff(by_pair["config", "mixed"], by_pair["pieces", "mixed"])
    assert {k: v[1] for k, v in found.items() if k.startswith("train")} == {
        "train.lr": 0.002,
        "train.lr_objective": 0.02,
    }


def test_overrides_have_the_last_word_and_seeds_count_upwards(project: Path) -> None:
    config = project / "two.yaml"
    grid = cells(
        config, load_variants(config), ["pieces", "rtb"], ["mixed"], 2, ["train.lr=0.5", "seed=7", "out=elsewhere"]
    )
    assert [(cell.objective, cell.config.seed) for cell in grid] == [
        ("pieces", 7),
        ("rtb", 7),
        ("pieces", 8),
        ("rtb", 8),
    ]
    assert {cell.config.train.lr for cell in grid} == {0.5}
    assert {cell.config.out for cell in grid} == {"elsewhere/two-compare/runs"}
    assert len({cell.config.name for cell in grid}) == 4


@pytest.mark.parametrize(
    ("objectives", "behaviours", "seeds", "message"),
    [
        (["vargard"], ["mixed"], 1, "no objective named 'vargard'. Did you mean 'vargrad'"),
        (["rtb"], ["mixd"], 1, "no behaviour named 'mixd'. Did you mean 'mixed'"),
        (["rtb", "rtb"], ["mixed"], 1, "'rtb' is given more than once"),
        (["rtb"], ["mixed"], 0, "seeds is 0"),
        (["rtb"], ["mixed"], -2, "seeds is -2"),
    ],
)
def test_impossible_grids(
    project: Path, objectives: list[str], behaviours: list[str], seeds: int, message: str
) -> None:
    config = project / "two.yaml"
    with pytest.raises(ConfigError, match=message):
        cells(config, load_variants(config), objectives, behaviours, seeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives: {a: {beta: 2.0}}", "objectives.a changes 'beta', which all runs of a comparison share"),
        ("objectives: {a: {prior: {component: gmm}}}", "changes 'prior'"),
        ("behaviors: {}", "must hold `objectives:` and `behaviours:`, got .'behaviors'"),
        ("objectives: [rtb]", "objectives: got .'rtb'.; write"),
        ("objectives: {a: rtb}", "objectives.a: got 'rtb'; write"),
        ("objectives: {a: {train: 3}}", "objectives.a.train: got 3"),
        (f"objectives: {{{AS_CONFIGURED}: {{}}}}", "a variant's name"),
        ('objectives: {"a/b": {}}', "a variant's name"),
        ("objectives: {a: {", "is not YAML"),
    ],
)
def test_impossible_variants(project: Path, text: str, message: str) -> None:
    (project / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_variants(project / "two.yaml", project / "mine.yaml")


def test_a_misspelt_key_in_a_variant_is_named(project: Path) -> None:
    (project / "mine.yaml").write_text("behaviours: {a: {behaviour: {prior_share: 0.5}}}")
    with pytest.raises(ConfigError, match=r"Write `behaviours: \[\{component: prior_buffer, share: 0\.5\}\]`"):
        cells(project / "two.yaml", load_variants(project / "two.yaml", project / "mine.yaml"), ["rtb"], ["a"], 1)
    with pytest.raises(ConfigError, match=r"no file of variants 'nowhere\.yaml'"):
        load_variants(project / "two.yaml", Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("argv", "objectives", "behaviours", "rest"),
    [
        (["c.yaml", "--objectives", "a", "b", "--behaviours", "x"], ["a", "b"], ["x"], []),
        (["--objectives", "a", "b", "c.yaml", "train.lr=1"], ["a", "b"], None, ["train.lr=1"]),
        (["c.yaml", "--objectives", "a", "--objectives", "b", "--seeds", "2"], ["a", "b"], None, []),
        (["--behaviours", "x", "y", "configs/c.yaml"], None, ["x", "y"], []),
    ],
)
def test_lists_of_names_after_one_flag(argv: list[str], objectives: Any, behaviours: Any, rest: list[str]) -> None:
    import typer

    from diffusion_rtb.cli.compare import compare

    app = typer.Typer()
    app.command("compare", cls=CompareCommand)(compare)
    command = typer.main.get_command(app)
    found = command.make_context("compare", list(argv)).params
    assert (found["objectives"] or None, found["behaviours"] or None) == (objectives, behaviours)
    assert list(found["overrides"] or []) == rest
    assert str(found["config"]).endswith("c.yaml")


def watched_run(config: RunConfig, *, points: int, samples: int) -> tuple[Trainer, Clock]:
    return timed(config, truth_of(config), Looks(1, points, samples))


def test_looking_changes_nothing_and_its_time_does_not_count(project: Path) -> None:
    plain, watched = (load_config(project / "two.yaml", [f"name={name}"]) for name in ("plain", "watched"))
    assemble(plain).fit()
    trainer, clock = watched_run(watched, points=3, samples=100)
    start = time.perf_counter()
    trainer.fit()
    assert 0 < clock.costs["seconds"] < time.perf_counter() - start
    one, other = (Path("runs") / name / "checkpoints" / "00000006" for name in ("plain", "watched"))
    for group in ("posterior", "objective", "optimizer", "source-prior"):
        a, b = (checkpoint.load_checkpoint(path)[0][group] for path in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    curve = read_lines(trainer.folder / "curve.jsonl")
    assert [point["iteration"] for point in curve] == [0, 2, 4]
    assert curve[0]["elbo"] < 0
    logged = read_lines(trainer.folder / "metrics.jsonl")
    seconds = [line["training_seconds"] for line in logged]
    assert seconds == sorted(seconds)
    assert seconds[-1] == clock.costs["seconds"]
    # A look is before the iteration of its number: its seconds are those after the iteration before.
    assert [point["seconds"] for point in curve[1:]] == [seconds[1], seconds[3]]


class Killing(Observer):
    """Ends the process, as far as the run can tell, right after an iteration's row was written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after(self, iteration: int, metrics: dict[str, float]) -> None:
        if iteration == self.at:
            raise KeyboardInterrupt


def test_the_clock_goes_on_after_an_interruption(project: Path) -> None:
    config = load_config(project / "two.yaml", ["train.checkpoint_every=2"])
    trainer, _ = watched_run(config, points=6, samples=8)
    trainer.observers.insert(2, Killing(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    before = read_lines(trainer.folder / "metrics.jsonl")
    assert len(before) == 3
    again, _ = watched_run(config, points=6, samples=8)
    again.observers.append(Killing(2))
    with pytest.raises(KeyboardInterrupt):
        again.fit()
    after = read_lines(again.folder / "metrics.jsonl")
    assert after[:2] == before[:2]
    curve = read_lines(again.folder / "curve.jsonl")
    assert [point["iteration"] for point in curve] == [0, 1, 2]
    for name in ("seconds", "cpu_seconds"):
        assert curve[2][name] == before[1][f"training_{name}"] < after[2][f"training_{name}"]
    watched_run(config, points=6, samples=8)[0].fit()
    assert [point["iteration"] for point in read_lines(again.folder / "curve.jsonl")] == list(range(6))


def test_a_comparison_is_written_and_nothing_is_run_twice(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left_with(["two.yaml", *GRID, *QUICK]) == 0
    printed = capsys.readouterr().out
    folder = project / "runs" / "two-compare"
    assert printed == (folder / "table.md").read_text()
    assert Image.open(folder / "figure.png").width > 600
    runs = numbers(folder)
    assert [(row["objective"], row["behaviour"], row["seed"]) for row in runs] == [
        ("truth", "exact denoiser", "0"),
        *((a, b, "0") for a in ("vargrad", "pieces") for b in ("mixed", "config")),
    ]
    for name in ("tv", "off_percent", "w2", "w2_per_floor", "elbo", "elbo_gap", "ess", "kl", "log_z"):
        assert all(row[name] for row in runs), name
    # 16 prior trajectories; of each batch 12 are drawn and held against the prior, 4 against the posterior; 16 get a gradient.
    mixed = runs[1]
    assert float(mixed["network_calls"]) == 6 * (16 + 6 * (12 + 12 + 4 + 3 * 16))
    assert float(mixed["reward_calls"]) == 16 + 6 * 12
    made = {path: starts(path) for path in (folder / "runs").iterdir()}
    assert len(made) == 4
    # More of the grid is added to what is there; less of it is a smaller table.
    assert (
        left_with(["two.yaml", "--objectives", "vargrad", "rtb", "--behaviours", "mixed", "--seeds", "1", *QUICK]) == 0
    )
    assert {path: starts(path) for path in made} == made
    assert len(list((folder / "runs").iterdir())) == 5
    rows = numbers(folder)
    assert [row["objective"] for row in rows] == ["truth", "vargrad", "rtb"]
    assert rows[1] == runs[1]
    # `rtb` by its own name has no log Z to learn: it is VarGrad.
    assert rows[2] | {"objective": "vargrad"} == rows[1]


def interrupted(argv: list[str], number: signal.Signals, path: Path, lines: int) -> int | None:
    """The exit code of the command in another process, to which a signal is sent once a file has so many lines."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(["compare", *argv],))
    process.start()
    deadline = time.monotonic() + 300
    while len(read_lines(path)) < lines and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(300)
    return process.exitcode


def test_an_interrupted_comparison_goes_on(project: Path) -> None:
    """Ctrl-C in the middle of the second run, then a kill further on, then to the end: as if nothing had happened."""
    argv = ["two.yaml", "--objectives", "vargrad", "pieces", "--behaviours", "mixed", "--seeds", "1", *QUICK]
    argv += ["train.iterations=24", "train.checkpoint_every=5"]
    folder = project / "runs" / "two-compare"
    first, second = folder / "runs" / "vargrad.mixed.0", folder / "runs" / "pieces.mixed.0"
    assert interrupted(argv, signal.SIGINT, second / "metrics.jsonl", 4) == 130
    measures = (first / "measures.json").stat().st_mtime_ns
    assert not (second / "measures.json").exists()
    assert "Unfinished: 1 of 2 runs" in (folder / "table.md").read_text()
    done = len(read_lines(second / "metrics.jsonl"))
    assert 4 <= done < 24

    assert interrupted(argv, signal.SIGKILL, second / "metrics.jsonl", done + 5) == -signal.SIGKILL
    assert not (second / "measures.json").exists()

    assert left_with(argv) == 0
    assert (first / "measures.json").stat().st_mtime_ns == measures
    assert (starts(first), starts(second)) == (1, 3)
    assert [line["iteration"] for line in read_lines(second / "metrics.jsonl")] == list(range(24))
    assert "Unfinished" not in (folder / "table.md").read_text()
    assert left_with([*argv, "name=whole"]) == 0
    assert numbers(project / "runs" / "whole-compare") == numbers(folder)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["two.yaml", "--objectives", "rbt"], 2, "Did you mean 'rtb'?"),
        (["two.yaml", "--behaviours", "on-policy"], 2, "Did you mean 'on_policy'?"),
        (["two.yaml", "--seeds", "0"], 2, "seeds is 0"),
        (["two.yaml", "reward={component: jpeg}"], 1, "not known in closed form"),
        (["two.yaml", "prior={component: 'tests.oracles.pixel:PixelPrior'}", LEARNING], 1, "learns from what it sees"),
        (["two.yaml", "--budget", "hours=3"], 2, "A budget is one of seconds"),
        (["two.yaml", "--budget", "seconds=-1"], 2, "got 'seconds=-1'"),
        (["two.yaml", "--objectives", "reinforce_kl", "ddpo", "--behaviours", "mixed"], 1, "ReinforceKL is on-policy"),
        (["two.yaml", "beta={value: 1.0, kl_budget: {nats: 1.0}}"], 1, "kl_budget changes beta"),
        (["nowhere.yaml"], 2, "There is no config 'nowhere.yaml'"),
    ],
)
def test_what_cannot_be_compared(
    project: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, message: str
) -> None:
    assert left_with([*argv, *QUICK]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("missing", "remedy"), [("ot", "pip install 'diffusion-rtb[compare]'"), ("matplotlib", "pip install matplotlib")]
)
def test_missing_packages_are_named_before_anything_is_trained(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert left_with(["two.yaml", *QUICK]) == 1
    assert remedy in capsys.readouterr().err
    assert not (project / "runs").exists()


def test_pairs_that_do_not_fit_are_left_out_with_the_reason(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--objectives", "reinforce_kl", "rtb", "--behaviours", "noisy", "--seeds", "1", "train.iterations=1"]
    assert left_with(["two.yaml", *argv, *QUICK]) == 0
    said = capsys.readouterr()
    assert "reinforce_kl with noisy is left out: objective ReinforceKL is on-policy" in said.err
    assert "* reinforce_kl with noisy was not run: objective ReinforceKL is on-policy" in said.out
    assert [path.name for path in (project / "runs" / "two-compare" / "runs").iterdir()] == ["rtb.noisy.0"]


def test_what_a_run_refuses_before_it_loads_leaves_a_pair_out(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a run of its own would say: one line each, and nothing is drawn before the last of them was looked at."""
    (project / "compare" / "two.yaml").write_text(
        """
objectives:
  parts: {objective: {component: reward_backprop}, behaviours: [], train: {gradient_steps: 2}}
"""
    )
    argv = ["--objectives", "rtb", "parts", "--behaviours", "config", "--seeds", "1", "train.iterations=1"]
    assert left_with(["two.yaml", *argv, *QUICK]) == 0
    assert (
        "* parts with config was not run: objective reward_backprop takes one gradient through"
        in capsys.readouterr().out
    )
    assert [path.name for path in (project / "runs" / "two-compare" / "runs").iterdir()] == ["rtb.config.0"]
    argv = ["two.yaml", "name=none", "--objectives", "parts", "--behaviours", "config", "--seeds", "1"]
    assert left_with([*argv, *QUICK]) == 1
    assert not (project / "runs" / "none-compare").exists()


def test_a_run_that_diverges_does_not_take_the_others_with_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = "objectives: {wild: {objective: {component: ddpo}, behaviours: [], train: {lr: 1.0e+4, warmup: 0, grad_clip: 1.0e+9}}}"
    (project / "wild.yaml").write_text(wild)
    argv = ["two.yaml", "--variants", "wild.yaml", "--behaviours", "config", "--seeds", "1", *QUICK]
    assert left_with([*argv, "--objectives", "wild", "rtb"]) == 0
    printed = capsys.readouterr()
    rows = {row["objective"]: row for row in numbers(project / "runs" / "two-compare")}
    assert rows["rtb"]["tv"]
    assert "wild" not in rows
    assert re.search(
        r"\* wild with config, seed 0, diverged in iteration \d: .*[Ll]ower (train\.lr|the learning rate)", printed.out
    )
    assert "Unfinished" not in printed.out
    assert "wild, config, seed 0: diverged in iteration" in " ".join(printed.err.split())
    assert left_with([*argv, "--objectives", "wild"]) == 1
    assert "No run came to an end: diverged in iteration" in " ".join(capsys.readouterr().err.split())


def test_another_comparisons_folder_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--seeds", "1", "train.iterations=1"]
    assert left_with(["two.yaml", *quick, *QUICK]) == 0
    before = sorted((project / "runs").rglob("*"))
    assert left_with(["two.yaml", *quick, "train.lr=0.5", *QUICK]) == 1
    assert "train.lr: 0.001 there, 0.5 now" in capsys.readouterr().err
    assert left_with(["two.yaml", *quick, *QUICK[2:], "--samples", "50"]) == 1
    assert "samples: 60 there, 50 now" in capsys.readouterr().err
    assert sorted((project / "runs").rglob("*")) == before
    (project / "runs" / "mine-compare").mkdir()
    (project / "runs" / "mine-compare" / "notes.txt").write_text("mine")
    assert left_with(["two.yaml", *quick, "name=mine", *QUICK]) == 1
    assert "is not a comparison's folder" in capsys.readouterr().err
    # More iterations continue the same runs.
    assert left_with(["two.yaml", "--seeds", "1", "train.iterations=2", *QUICK]) == 0
    (run,) = (project / "runs" / "two-compare" / "runs").iterdir()
    assert starts(run) == 2
    assert len(read_lines(run / "metrics.jsonl")) == 2


def test_a_comparison_goes_on_without_its_damaged_sheet(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["two.yaml", "--seeds", "1", "train.iterations=1", *QUICK]
    assert left_with(argv) == 0
    folder = project / "runs" / "two-compare"
    found, sheet = numbers(folder), folder / "comparison.json"
    sheet.write_text("{")
    assert left_with(argv) == 1
    assert "Delete it: the runs beside it are checked one by one." in " ".join(capsys.readouterr().err.split())
    sheet.unlink()
    assert left_with(argv) == 0
    (run,) = (folder / "runs").iterdir()
    assert (starts(run), numbers(folder)) == (1, found)
    sheet.unlink()
    assert left_with([*argv, "train.lr=0.5"]) == 1  # the run says that it is another's
    assert starts(run) == 1


def test_a_variant_that_has_changed_is_not_taken_for_what_it_was(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["two.yaml", "--behaviours", "mixed", "--seeds", "1", "train.iterations=1", *QUICK]
    assert left_with(argv) == 0
    table = (project / "runs" / "two-compare" / "table.md").read_text()
    (project / "compare" / "two.yaml").write_text(VARIANTS.replace("capacity: 16", "capacity: 24"))
    assert left_with(argv) == 1
    said = capsys.readouterr().err
    assert "behaviours[0]: " in said
    assert "Give the changed variant another name" in said
    assert (project / "runs" / "two-compare" / "table.md").read_text() == table


def test_the_commands_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert left_with(["--help"]) == 0
    said = capsys.readouterr().out
    assert "diffusion-rtb compare configs/gaussian.yaml --objectives" in said
