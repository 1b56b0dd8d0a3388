"""What was found about rewards, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusion_rtb.files.plain_text import plain_lines
from diffusion_rtb.files.terminal import shown
from diffusion_rtb.reward_check.report import NOT_REACHED, Report, Reports
from diffusion_rtb.reward_check.subject import Status

__all__ = ["show_reports"]

STYLES: Mapping[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "info": "", "skip": "dim"}


def show_reports(reports: Reports, console: Console) -> None:
    """Print a table per reward and a verdict on each."""
    console.print(shown(f"Samples: {reports.samples.source}"), "", soft_wrap=True, sep="\n")
    for report in reports.rewards:
        console.print(_table(report))
        console.print(shown(_verdict(report)), "", soft_wrap=True, sep="\n")


def _table(report: Report) -> Table:
    table = Table(title=shown(f"Reward {report.name}"), title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column, no_wrap=column == "check")
    numbers = report.statistics()
    if numbers:
        quartiles = ", ".join(f"{numbers[key]:.4g}" for key in ("min", "quarter", "median", "three_quarters", "max"))
        found = f"mean {numbers['mean']:.4g}, standard deviation {numbers['std']:.3g}; quartiles {quartiles}"
        table.add_row("values", "", found, end_section=True)
    reached = [check for check in report.checks if check.message != NOT_REACHED]
    for check in reached:
        table.add_row(
            shown(check.name), check.status.upper(), Text(plain_lines(check.message)), style=STYLES[check.status]
        )
    if len(reached) < len(report.checks):
        table.add_row("", "SKIP", f"the other {len(report.checks) - len(reached)} checks, {NOT_REACHED}", style="dim")
    return table


def _verdict(report: Report) -> str:
    bad = [check.name for check in report.checks if check.status == "fail"]
    odd = [check.name for check in report.checks if check.status == "warn"]
    look = f"; look at: {', '.join(odd)}" if odd else ""
    return f"{'FAIL: ' if bad else 'PASS'}{', '.join(bad)}{look}"
