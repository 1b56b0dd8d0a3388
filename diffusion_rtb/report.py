"""Evaluate a run: load, measure, write eval/, show tables on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusion_rtb.actor import Actor
from diffusion_rtb.assemble import load_posterior
from diffusion_rtb.config import RunConfig
from diffusion_rtb.evaluation import PICTURES, Drawn, draw, summarise
from diffusion_rtb.export import export_posterior
from diffusion_rtb.grids import save_png, side_by_side
from diffusion_rtb.locate import build

__all__ = ["evaluate_run", "show"]


def evaluate_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a run's posterior against its prior; write RUN/eval/ and the model card; print the tables.

    The same command twice writes the same metrics.json byte for byte: times go to timing.json.

    Raises:
        ValueError: the folder is no run, or has no complete checkpoint.
    """
    start = perf_counter()
    config, prior = load_posterior(run, overrides)
    reward: Any = build(config.reward, "reward")
    embedder: Any = None if config.eval.embedder is None else build(config.eval.embedder, "reward")
    judge: Any = embedder if config.eval.judge is None else build(config.eval.judge, "reward")
    actor = Actor(prior, reward, config.prompts.texts(), config.eval.batch)
    tools = {"embedder": embedder, "judge": judge}
    before = draw(actor, config.eval, config.eval.prior_samples, config.seed, posterior=False, **tools)
    after = draw(actor, config.eval, config.eval.samples, config.seed, posterior=True, **tools)
    numbers = summarise(before, after, actor.prompts, config.beta, config.eval)
    folder = Path(run) / "eval"
    folder.mkdir(exist_ok=True)
    _write(folder / "metrics.json", numbers)
    picture = _picture(before, after, config)
    save_png(picture, folder / "side_by_side.png")
    export_posterior(config, prior, run, evaluation=_card_table(numbers["overall"]))
    _write(folder / "timing.json", {"seconds": perf_counter() - start} | actor.stopwatch.read())
    show(numbers, Console())
    Console(stderr=True, soft_wrap=True).print(
        f"Pictures: {folder / 'side_by_side.png'}   numbers: {folder / 'metrics.json'}"
    )
    return numbers


def _write(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _picture(prior: Drawn, posterior: Drawn, config: RunConfig) -> Any:
    """Pairs at the same noise, as many per prompt as both sides have, each with its reward."""
    prompts = config.prompts.texts()
    kept = [len(side.pictures) // len(prompts) for side in (prior, posterior)]
    count = min(*kept, PICTURES)
    images, captions = [], []
    for side, held in zip((prior, posterior), kept, strict=True):
        shape = (len(prompts), held, *side.pictures.shape[1:])
        images.append(side.pictures.reshape(shape)[:, :count])
        rewards = side.picture_rewards.reshape(len(prompts), held)[:, :count]
        captions.append([[f"{value:.2f}" for value in row] for row in rewards.tolist()])
    return side_by_side(images[0], images[1], prompts, captions=(captions[0], captions[1]))


def _card_table(overall: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the model card shows, metric -> prior and posterior."""
    table: dict[str, dict[str, Any]] = {
        "reward": {"prior": overall["reward"]["prior"], "posterior": overall["reward"]["posterior"]},
        "KL to the prior (nats)": {"prior": 0.0, "posterior": overall["kl"]["mean"]},
        "ELBO (nats)": {"prior": None, "posterior": overall["elbo"]},
        "effective sample size": {"prior": overall["ess"]["prior"], "posterior": overall["ess"]["posterior"]},
    }
    if overall["diversity"] is not None:
        for key, label in (("pairwise_cosine_distance", "pairwise cosine distance"), ("vendi", "Vendi score")):
            table[label] = {side: overall["diversity"][side][key] for side in ("prior", "posterior")}
    return table


def show(numbers: Mapping[str, Any], console: Console) -> None:
    """Print the evaluation: one line per prompt and overall, then one table per checked factor."""
    console.print(_reward_table(numbers))
    console.print(_cost_table(numbers))
    overall = numbers["overall"]
    rise, within = (overall["reward"][key] for key in ("rise_in_prior_std", "rise_in_within_prompt_std"))
    if rise is not None and within is not None:
        console.print(
            f"Mean reward rose by {rise:.2f} prior standard deviations ({within:.2f} within prompts); the exact posterior's, from "
            f"re-weighted prior samples, is {overall['reward']['reweighted_prior']:.3g}.",
            soft_wrap=True,
        )
    for check in numbers["posterior_check"]:
        console.print(_check_table(check))
        console.print(_verdict(check), soft_wrap=True)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column names the row, the last row is over all prompts."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i == len(rows) - 1 else "", end_section=i == len(rows) - 2)
    return table


def _named_rows(numbers: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(row["prompt"], row) for row in numbers["per_prompt"]] + [("all", numbers["overall"])]


def _reward_table(numbers: Mapping[str, Any]) -> Table:
    counts = numbers["samples"]
    rows = [
        (name, *(_with_interval(row["reward"][side]) for side in ("prior", "posterior")))
        for name, row in _named_rows(numbers)
    ]
    columns = ("prompt", f"prior, {counts['prior']} samples", f"posterior, {counts['posterior']} samples")
    return _table("Mean reward and its interval", columns, rows)


def _cost_table(numbers: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in _named_rows(numbers):
        log_z, diversity = row["log_z"]["from_prior"], row["diversity"]
        bounds = (f"{row['elbo']:.2f}", f"{log_z:.2f}", f"{row['ess']['posterior']:.2f}")
        spread = [
            "-" if diversity is None else f"{diversity['prior'][key]:.3g} → {diversity['posterior'][key]:.3g}"
            for key in ("pairwise_cosine_distance", "vendi")
        ]
        rows.append((name, f"{row['kl']['mean']:.2f} ± {row['kl']['standard_error']:.2f}", *bounds, *spread))
    title = f"What it cost, in nats, and the diversity that is left (beta {numbers['beta']:g})"
    return _table(title, ("prompt", "KL", "ELBO", "log Z", "ESS", "distance", "Vendi"), rows)


def _with_interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _check_table(check: Mapping[str, Any]) -> Table:
    table = Table(title=f"Is it the posterior? Shares of each {check['factor']}", title_justify="left")
    for name in (check["factor"], "prior", "prior re-weighted by exp(beta·r)", "posterior"):
        table.add_column(name, justify="left" if name == check["factor"] else "right")
    for label, *shares in zip(*(check[key] for key in ("labels", "prior", "reweighted", "posterior")), strict=True):
        table.add_row(label, *(f"{share:.3f}" for share in shares))
    return table


def _verdict(check: Mapping[str, Any]) -> str:
    tv, noise = check["tv"], check["noise"]
    missing = f"; never produced: {', '.join(check['missing'])}" if check["missing"] else ""
    return (
        f"total variation {tv['mean']:.3f} [{tv['low']:.3f}, {tv['high']:.3f}]; sampling noise explains {noise['mean']:.3f}; "
        f"the prior itself: {check['tv_prior']:.3f}{missing} -> "
        f"{'within' if check['passed'] else 'NOT within'} the tolerance of {check['tolerance']:g}\n"
    )
