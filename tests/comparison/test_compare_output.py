"""The tables and the figure of a comparison, from results that are made up by hand."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffusion_rtb.comparison.curves import NEAR, _ticks, draw_curves
from diffusion_rtb.comparison.figure import draw_figure
from diffusion_rtb.comparison.results import Comparison, Plan, cost_to, median_run
from diffusion_rtb.comparison.table import markdown, rows, write_tables
from diffusion_rtb.comparison.truths.known import KnownTruth
from diffusion_rtb.comparison.truths.transport import Distance
from diffusion_rtb.comparison.truths.truth import Looks, Reference, Result
from diffusion_rtb.comparison.variants import Cell
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.exact import ExactTarget, Modes
from tests.oracles.pixel import PixelPrior

Pair = tuple[str, str]


def config(seed: int, out: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "made-up",
            "out": str(out),
            "seed": seed,
            "prior": {"component": "gaussian"},
            "reward": {"component": "density"},
            "beta": 1.0,
            "prompts": {"list": [""]},
            "train": {"prompts_per_iteration": 1, "group": 32},
        }
    )


def normal_target(dim: int, modes: bool) -> ExactTarget:
    normal = torch.distributions.MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())

    def sample(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(count, dim, generator=generator, dtype=torch.float64)

    return ExactTarget(
        log_z=-1.5,
        sample=sample,
        as_exact=PixelPrior().as_prior,
        modes=Modes(torch.zeros(1, dim), torch.ones(1), 1.0) if modes else None,
        log_density=normal.log_prob if dim == 2 else None,
    )


def result(dim: int, modes: bool, k: float, *, trained: bool = True) -> Result:
    """Numbers that grow with k."""
    n: dict[str, Any] = {"w2": 1.0 + k, "elbo": -1.5 - k, "ess": 0.5, "kl": k, "log_z": -1.5, "exact_log_z": -1.5}
    n |= {"tv": 0.1 * k, "off": 0.01 * k} if modes else {}
    n |= {"seconds": 100.0 * k, "cpu_seconds": 90.0 * k} if trained else {}
    curve = [
        {"iteration": i, "seconds": 10.0 * i * k, "cpu_seconds": 9.0 * i * k, "elbo": -4.0 + i}
        | ({"tv": 0.4 / (i + 1), "off": 0.0} if modes else {})
        for i in range(3)
    ]
    return Result(n, curve if trained else [], 0.5 * torch.randn(200, dim))


def comparison(
    out: Path, done: Mapping[Pair, list[float]], *, dim: int = 2, modes: bool = True, seeds: int = 3, **plan: Any
) -> Comparison:
    cells = [Cell(*pair, config(seed, out)) for seed in range(seeds) for pair in done]
    folder = out / "made-up-compare"
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"refused": {}, "cost": "seconds"} | plan
    truth = KnownTruth(normal_target(dim, modes), PixelPrior(), lambda: lambda images, prompts: images.flatten(1)[:, 0])
    truth.floor = Distance(0.8, 0.01)
    runs = [(seed, result(dim, modes, 0.1, trained=False)) for seed in range(seeds)]
    truth.references = [Reference("truth", "exact denoiser", runs)]
    work = Plan(
        config=config(0, out),
        folder=folder,
        cells=cells,
        looks=Looks(4000, 5, 100),
        truth=truth,
        **settings,
    )
    found = Comparison(work)
    found.results = {pair: [(s, result(dim, modes, k)) for s, k in enumerate(ks)] for pair, ks in done.items() if ks}
    return found


def test_a_row_is_the_median_and_the_range_over_seeds(tmp_path: Path) -> None:
    found = comparison(tmp_path, {("rtb", "replay"): [3.0, 1.0, 1.5], ("dpok", "on_policy"): [0.4, 0.6, 0.5]})
    paths = write_tables(found)
    assert [path.name for path in paths] == ["table.md", "table.csv", "runs.csv"]
    with paths[1].open() as file:
        table = {(row["objective"], row["behaviour"]): row for row in csv.DictReader(file)}
    assert list(table) == [("truth", "exact denoiser"), ("rtb", "replay"), ("dpok", "on_policy")]
    row = table["rtb", "replay"]
    assert [float(row[f"tv_{part}"]) for part in ("median", "min", "max")] == pytest.approx([0.15, 0.1, 0.3])
    assert float(row["off_percent_median"]) == pytest.approx(1.5)
    assert float(row["w2_per_floor_max"]) == pytest.approx(4.0 / 0.8)
    assert float(row["elbo_gap_median"]) == pytest.approx(-1.5)
    with paths[2].open() as file:
        runs = [row for row in csv.DictReader(file) if row["objective"] == "rtb"]
    assert [float(run["kl"]) for run in runs] == [3.0, 1.0, 1.5]
    assert statistics.median(float(run["tv"]) for run in runs) == pytest.approx(float(row["tv_median"]))
    text = markdown(found)
    assert "| rtb | replay | 3 | 0.150 [0.100, 0.300] | 1.50 [1.00, 3.00] |" in text
    assert "0.800 ± 0.010 (floor)" in text
    assert "Unfinished" not in text


def test_seconds_to_a_total_variation_are_those_of_the_first_look_that_has_it() -> None:
    curve = [
        {"seconds": s, "cpu_seconds": s / 2, "tv": tv} for s, tv in ((0.0, 0.4), (7.0, 0.05), (9.0, 0.06), (11.0, 0.01))
    ]
    assert cost_to(curve) == 7.0
    assert cost_to(curve, "cpu_seconds") == 3.5
    assert cost_to(curve, tv=0.02) == 11.0
    assert cost_to(curve, tv=0.001) is None
    assert cost_to([{"seconds": 1.0, "elbo": 0.0}]) is None


def test_a_target_without_modes_has_no_columns_of_modes(tmp_path: Path) -> None:
    text = markdown(comparison(tmp_path, {("rtb", "config"): [1.0]}, modes=False, seeds=1))
    assert "TV" not in text
    assert "off" not in text
    assert "ELBO − log Z" in text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    refused = {("ddpo", "replay"): "objective DDPO is on-policy"}
    found = comparison(tmp_path, {("rtb", "replay"): [1.0, 0.4], ("grpo", "replay"): []}, refused=refused)
    assert not found.complete
    text = markdown(found)
    assert "* ddpo with replay was not run: objective DDPO is on-policy" in text
    assert "* Unfinished: 2 of 6 runs" in text
    assert "| grpo | replay | 0 | - |" in text
    # 40 s in the run that has TV 0.04 only at its end; the other run never has 0.05.
    assert [row.values("cost_to_tv") for row in rows(found)] == [[], [40.0], []]
    assert "40 (1 of 2) |" in text


def test_the_clock_decides_which_seconds_are_shown(tmp_path: Path) -> None:
    text = markdown(comparison(tmp_path, {("rtb", "config"): [0.2]}, seeds=1, cost="cpu_seconds"))
    assert "training CPU s" in text
    assert "CPU seconds of the process" in text
    assert rows(comparison(tmp_path / "other", {("rtb", "config"): [0.2]}, seeds=1))[1].values("cost_to_tv") == [20.0]


def test_the_pictured_run_is_the_median_one() -> None:
    four = [result(2, True, k) for k in (0.4, 0.1, 0.3, 0.2)]
    assert median_run(four[:3]) is four[2]
    assert median_run(four) is four[3]
    assert median_run([result(2, False, k) for k in (3.0, 1.0, 2.0)]).numbers["w2"] == 3.0


@pytest.mark.parametrize(("dim", "modes"), [(1, True), (2, True), (2, False), (3, False)])
def test_the_figure_shows_every_sampler(tmp_path: Path, dim: int, modes: bool) -> None:
    pairs = {(f"objective_{i}", "replay"): [1.0, 0.5, 2.0][: 1 + i % 3] for i in range(4)}
    found = comparison(tmp_path, pairs, dim=dim, modes=modes)
    picture = Image.open(draw_figure(found)).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
    # The first four colours of the cycle: one for each sampler's curve.
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)} <= colours
    # Six panels are two rows, six more make it taller.
    more = comparison(tmp_path / "more", {(str(i), "x"): [1.0] for i in range(9)}, dim=dim, modes=modes, seeds=1)
    assert Image.open(draw_figure(more)).height > picture.height
    assert [path.name for path in found.plan.folder.iterdir()] == ["figure.png"]


def test_one_that_ran_away_does_not_squeeze_the_others(tmp_path: Path) -> None:
    """DDPO at a KL of 4,000 nats once left one stroke of all others; and 23 curves were told apart by 20 colours."""
    found = comparison(tmp_path, {(str(i), "x"): [1.0] for i in range(23)}, seeds=1)
    for pair, [(seed, run)] in found.results.items():
        far = {"kl": 4000.0} if pair[0] == "3" else {}
        found.results[pair] = [(seed, replace(run, numbers={**run.numbers, "reward": 0.0, **far}))]
    figure = Figure()
    draw_curves(figure, found)
    price = figure.axes[-1]
    assert price.get_xlim()[0] < 0 < 4000 < price.get_xlim()[1]
    place = price.transData.transform
    across = price.bbox.width
    assert place((0.4, 0))[0] - place((0.0, 0))[0] > across / 2  # four times the truth's KL, 0.1
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[:23]}
    assert len(looks) == 23


@pytest.mark.parametrize("far", [0.4, 1.0, 2.9, 5.1, 8.04, 9.99, 30.0, 730.0])
def test_no_two_numbers_of_the_stretched_axis_run_together(far: float) -> None:
    for right in (1.2 * far, 5 * far, 300 * far):
        ticks = _ticks(far, right)
        places = [NEAR * x / far if x <= far else NEAR + math.log10(x / far) for x in ticks]
        assert all(b - a >= 1 - 1e-9 for a, b in pairwise(places)), ticks
        assert ticks[0] == 0
        assert len(ticks) >= 3
        assert ticks[-1] < right
