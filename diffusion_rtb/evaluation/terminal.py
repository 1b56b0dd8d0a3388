"""The evaluation's numbers as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusion_rtb.evaluation.choice import LISTED, listed
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics.log_z import FEW
from diffusion_rtb.evaluation.side_tables import SIDES, side_tables
from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.files.terminal import shown

__all__ = ["show"]

LONGEST = 200
"""Characters of a prompt or a label that are shown; metrics.json has all of them."""


def show(numbers: Mapping[str, Any], metrics: Sequence[Metric], console: Console) -> None:
    """Print the evaluation: a row per side over all prompts, what the metrics say of it, one line per prompt, of many for some, and
    one table per checked factor.
    """
    overall = numbers["overall"]
    for table in side_tables(numbers, metrics, console.width):
        console.print(table)
    for text in _sentences(numbers, metrics):
        console.print(shown(text), soft_wrap=True)
    if overall.get("log_z") is not None:
        console.print(shown(_log_z(overall["log_z"])), soft_wrap=True)
    if overall.get("reward") is not None and overall.get("ess") is not None:
        console.print(shown(_rise(overall, numbers["samples"]["prior"])), "", soft_wrap=True, sep="\n")
    for row in numbers.get("left_out", []):
        console.print(shown(f"Left out: {row['metric']}, as {row['why']}."), soft_wrap=True)
    if len(numbers["per_prompt"]) > 1:
        _show_prompts(numbers, metrics, console)
    for check in numbers.get("posterior_check") or []:
        console.print(_check_table(check))
        console.print(shown(_verdict(check)), "", soft_wrap=True, sep="\n")


def _show_prompts(numbers: Mapping[str, Any], metrics: Sequence[Metric], console: Console) -> None:
    if "reward" in numbers["overall"]:
        console.print(_reward_table(numbers))
    if any(metric.columns for metric in metrics):
        console.print(_table_of(numbers, metrics))
    if len(numbers["per_prompt"]) > LISTED:
        console.print(shown(_left_out(numbers)), soft_wrap=True)


def _sentences(numbers: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    """What the metrics themselves say."""
    found = numbers | numbers["overall"]
    beta = math.nan if numbers["beta"] is None else numbers["beta"]
    said = [m.sentence(found[m.name], beta) for m in metrics if found.get(m.name) is not None]
    return [text for text in said if text]


def _log_z(log_z: Mapping[str, Any]) -> str:
    """How well log Z is known from prior samples."""
    if log_z["from_prior_bias"] is None:
        return f"log Z {log_z['from_prior']:.2f}, from prior samples, errs low; by how much, one sample per prompt does not say."
    text = (
        f"log Z {log_z['from_prior']:.2f}, from prior samples, errs low, here by about {max(0.0, -log_z['from_prior_bias']):.2f}: "
        f"interval [{log_z['from_prior_low']:.2f}, {log_z['from_prior_high']:.2f}]"
    )
    few = log_z["effective_prior_samples"]
    if few >= FEW:
        return f"{text}."
    return (
        f"{text}, which is too narrow, as a prompt has only {few:.0f} effective samples: log Z may be higher still, and an ELBO "
        "above it is no error. Draw more (eval.prior_samples)."
    )


def _rise(overall: Mapping[str, Any], prior_samples: int) -> str:
    """How far the reward rose, how far the exact posterior's would have, and how well that is known."""
    reward, share = overall["reward"], overall["ess"]["prior"]
    known = f"re-weighting leaves an effective {share * prior_samples:.0f} of {prior_samples} prior samples per prompt"
    if reward["rise_in_prior_std"] is None or reward["rise_in_within_prompt_std"] is None:
        return f"The prior's rewards do not vary; {known}."
    exact = (reward["reweighted_prior"]["mean"] - reward["prior"]["mean"]) / reward["prior_std"]
    return (
        f"Mean reward: {reward['rise_in_prior_std']:+.2f} prior standard deviations ({reward['rise_in_within_prompt_std']:+.2f} "
        f"within prompts). The exact posterior's: {exact:+.2f}; {known}."
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column names the row."""
    table = Table(title=shown(title), title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(shown(name), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(shown(cell, LONGEST) for cell in row))
    return table


def _named_rows(numbers: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(row["prompt"], row) for row in listed(numbers["per_prompt"])]


def _left_out(numbers: Mapping[str, Any]) -> str:
    """What the tables do not show."""
    return (
        f"Of {len(numbers['per_prompt'])} prompts the tables show the {LISTED // 2} whose reward rose most and the {LISTED // 2} "
        "where it rose least; eval/metrics.json has all."
    )


def _reward_table(numbers: Mapping[str, Any]) -> Table:
    rows = [
        (
            name,
            *(_mean_of(row["reward"].get(key)) for key in SIDES),
            _mean_of(row["reward"].get("paired_difference"), ends=True),
        )
        for name, row in _named_rows(numbers)
    ]
    return _table("Mean reward", ("prompt", "prior", "re-weighted", "posterior", "higher by"), rows)


def _mean_of(value: Mapping[str, Any] | None, *, ends: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.2f}" + (f" [{value['low']:.2f}, {value['high']:.2f}]" if ends else "")


def _table_of(numbers: Mapping[str, Any], metrics: Sequence[Metric]) -> Table:
    """The columns of all metrics that have some."""
    rows = [(name, *(text for m in metrics for text in _texts(m, row))) for name, row in _named_rows(numbers)]
    title = "Strength, cost in nats, diversity"
    return _table(title, ("prompt", *(column for m in metrics for column in m.columns)), rows)


def _texts(metric: Metric, row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get(metric.name)
    return ("-",) * len(metric.columns) if value is None else metric.row(value)


def _check_table(check: Mapping[str, Any]) -> Table:
    factor = plain(check["factor"], LONGEST)
    table = Table(title=shown(f"Is it the posterior? Shares of each {factor}"), title_justify="left")
    for i, name in enumerate((factor, "prior", "prior re-weighted by exp(beta·r)", "posterior")):
        table.add_column(shown(name), justify="left" if i == 0 else "right")
    for label, *shares in zip(*(check[key] for key in ("labels", "prior", "reweighted", "posterior")), strict=True):
        table.add_row(shown(label, LONGEST), *(f"{share:.3f}" for share in shares))
    return table


def _verdict(check: Mapping[str, Any]) -> str:
    tv, noise = check["tv"], check["noise"]
    missing = (
        f"; never produced: {', '.join(plain(label, LONGEST) for label in check['missing'])}"
        if check["missing"]
        else ""
    )
    return (
        f"{'PASS' if check['passed'] else 'FAIL'}: total variation {tv['mean']:.3f} [{tv['low']:.3f}, {tv['high']:.3f}] is "
        f"{'within' if tv['mean'] <= check['tolerance'] else 'NOT within'} the tolerance of {check['tolerance']:g}{missing}. "
        f"Sampling noise alone makes {noise['mean']:.3f} (p = {check['p_value']:.2g}); "
        f"the prior itself has {check['tv_prior']:.3f}."
    )
