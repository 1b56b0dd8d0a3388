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
    samples: Annotated[int, typer.Option(min=2, help="Samples that each sampler is measured on.")] = 40_000,
    points: Annotated[int, typer.Option(min=0, help="Looks at a posterior while it is trained.")] = 25,
    point_samples: Annotated[int, typer.Option(min=4, help="Samples of one such look.")] = 4000,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="Seconds of the figure: cpu is fairer on a machine that is shared.")
    ] = "wall",
    traceback: Traceback = False,
) -> None:
    """Train every objective with every behaviour on several seeds, and hold the results against the exact posterior.

    For priors whose posterior is known (`gaussian`, `gmm`). Names are those of objectives, of the package's variants and of
    those beside CONFIG; an unknown one is answered with all of them. The runs are ordinary ones, in `out/NAME-compare/runs`;
    given again, the command goes on where it was interrupted and repeats nothing.

    In the comparison's folder: table.md and table.csv (median and range over seeds), runs.csv, figure.png.

    **Examples**

        diffusion-rtb compare configs/gaussian.yaml --objectives rtb trust_pcl reinforce_kl --seeds 3

        diffusion-rtb compare configs/gaussian.yaml --objectives rtb dpok --behaviours on_policy train.iterations=50
    """
    with errors_explained(traceback):
        from diffusion_rtb.comparison.figure import draw_figure
        from diffusion_rtb.comparison.plan import held, plan, run
        from diffusion_rtb.comparison.results import Comparison, Looks
        from diffusion_rtb.comparison.table import markdown, write_tables

        looks = Looks(samples, points, point_samples)
        work = plan(
            config,
            objectives or ["config"],
            behaviours or ["config"],
            seeds,
            overrides or (),
            variants=variants,
            looks=looks,
            clock="cpu_seconds" if clock == "cpu" else "seconds",
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
            if not found.complete:
                say(f"Stopped in a run; of {len(work.cells)} runs the same command goes on with what is left.")
                raise typer.Exit(INTERRUPTED)
