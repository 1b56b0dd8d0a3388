"""The command `compare`: objectives and behaviours against a known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from diffusion_rtb.cli.messages import INTERRUPTED, Traceback, errors_explained, say

__all__ = ["CompareCommand", "compare"]

LISTS = ("--objectives", "--behaviours")


class CompareCommand(TyperCommand):
    """A command whose list options take several names after one flag: `--objectives rtb vargrad`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further name; a name has no `=`, `/` or `.yaml` and does not start with `-`."""
        spread: list[str] = []
        flag: str | None = None
        fresh = False
        for argument in args:
            name = not (argument.startswith("-") or "=" in argument or "/" in argument or argument.endswith(".yaml"))
            if argument in LISTS:
                flag, fresh = argument, True
            elif not name:
                flag = None
            elif flag is not None and not fresh:
                spread.append(flag)
            if argument not in LISTS:
                fresh = False
            spread.append(argument)
        return super().parse_args(ctx, spread)


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; every run starts from it.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Override keys of every run; values in YAML: train.iterations=200"),
    ] = None,
    objectives: Annotated[
        list[str] | None, typer.Option("--objectives", metavar="NAME...", help="Default: config, that of CONFIG.")
    ] = None,
    behaviours: Annotated[
        list[str] | None, typer.Option("--behaviours", metavar="NAME...", help="Default: config, that of CONFIG.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each pair, with seeds from the config's upwards.")] = 3,
    variants: Annotated[
        Path | None, typer.Option(help="Named variants. Default: compare/NAME.yaml beside CONFIG, if there is one.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="Samples that each sampler is measured on. Default: 40000; of pictures eval.samples per prompt."
        ),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=0, help="Looks at a posterior while it is trained. Default: 25; of pictures 5.")
    ] = None,
    point_samples: Annotated[
        int | None,
        typer.Option(min=4, help="Samples of one such look. Default: 4000; of pictures eval.samples / 8 per prompt."),
    ] = None,
    clock: Annotated[
        Literal["wall", "cpu", "network_calls", "reward_calls"],
        typer.Option(help="What the figure's curves are against: cpu seconds are fairer on a machine that is shared."),
    ] = "wall",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="COST=NUMBER", help="End each run there: seconds=, cpu_seconds=, network_calls= or reward_calls=."
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Train every objective with every behaviour on several seeds, and hold the results against the exact posterior.

    Where the posterior is not known (all priors but `gaussian` and `gmm`) the truth is the prior's own samples, weighted by
    exp(beta·r): their number, the factors that are counted and the features of the diversity are those of `eval:`.

    Names are those of objectives, of the package's variants and of those beside CONFIG; an unknown one is answered with all of
    them. The runs are ordinary ones, in `out/NAME-compare/runs`; given again, the command goes on where it was interrupted.

    In the comparison's folder: table.md and table.csv (median and range over seeds), runs.csv, figure.png.

    **Examples**

        diffusion-rtb compare configs/gaussian.yaml --objectives rtb trust_pcl reinforce_kl --seeds 3

        diffusion-rtb compare configs/gaussian.yaml --objectives rtb dpok --behaviours on_policy train.iterations=50

        diffusion-rtb compare configs/emoji_trust_pcl.yaml --objectives config vargrad ddpo --budget network_calls=100000
    """
    with errors_explained(traceback):
        from diffusion_rtb.comparison.cost import Budget
        from diffusion_rtb.comparison.figure import draw_figure
        from diffusion_rtb.comparison.plan import held, plan, run
        from diffusion_rtb.comparison.results import Comparison
        from diffusion_rtb.comparison.table import markdown, write_tables

        costs: dict[str, Any] = {"wall": "seconds", "cpu": "cpu_seconds"}
        work = plan(
            config,
            objectives or ["config"],
            behaviours or ["config"],
            seeds,
            overrides or (),
            variants=variants,
            samples=samples,
            points=points,
            point_samples=point_samples,
            cost=costs.get(clock, clock),
            budget=None if budget is None else Budget.of(budget),
        )
        for (a, b), reason in work.refused.items():
            say(f"{a} with {b} is left out: {reason}", style="yellow")

        def written(so_far: Comparison) -> None:
            write_tables(so_far)

        with held(work):
            found = run(work, say, written)
            if found.results:
                write_tables(found)
                figure = draw_figure(found)
                typer.echo(markdown(found), nl=False)
                say(f"Tables and {figure.name} are in {work.folder}.")
            if found.diverged and not found.results:
                raise ValueError("No run came to an end: " + "; ".join(dict.fromkeys(found.diverged.values())))
            if not found.complete:
                say(f"Stopped in a run; of {len(work.cells)} runs the same command goes on with what is left.")
                raise typer.Exit(INTERRUPTED)
