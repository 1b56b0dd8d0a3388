"""The command `sweep`: several betas, or values of another key, as one frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_rtb.cli.messages import INTERRUPTED, Traceback, errors_explained, say

__all__ = ["sweep"]


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; every point starts from it.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2,... [KEY=VALUE]",
            help="What is swept: beta=0.5,1,2,4; other keys are overrides of all points.",
        ),
    ] = None,
    warm_start: Annotated[
        bool | None,
        typer.Option(
            "--warm-start/--no-warm-start",
            help="Start each point from the next smaller one's posterior. Default: along beta and numbers of reward.",
        ),
    ] = None,
    warm_iterations: Annotated[
        int | None, typer.Option(help="Iterations of a point that does. Default: half of train.iterations.")
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="OBJECTIVE", help="What is run beside the points and stopped early; none: nothing.")
    ] = "ddpo",
    traceback: Traceback = False,
) -> None:
    """Train and evaluate CONFIG at several values of a key, and show what more reward costs in KL and diversity.

    Each point is an ordinary run, OUT/NAME-beta-0.5, which train, eval and sample open. Several keys make a grid. The command,
    given again, goes on where it was interrupted and repeats nothing; a point that fails is named, and the others go on.

    Beside the points runs DDPO on the same config, whose early stops are its only way to trade reward for KL. In OUT/NAME-sweep:
    sweep.json (all numbers), table.md and index.html.

    **Examples**

        diffusion-rtb sweep configs/gaussian.yaml beta=0.5,1,2,4

        diffusion-rtb sweep configs/quickstart.yaml beta=0.5,1,2 train.iterations=50 --warm-iterations 20

        diffusion-rtb sweep configs/gaussian.yaml train.lr=0.01,0.03 train.group=64,256 --baseline none
    """
    with errors_explained(traceback):
        from diffusion_rtb.evaluation.evaluate import evaluate_run
        from diffusion_rtb.files.terminal import console, shown
        from diffusion_rtb.report.page import write_page
        from diffusion_rtb.sweep.plan import plan
        from diffusion_rtb.sweep.run import SweepStoppedError, run
        from diffusion_rtb.sweep.table import legend, table, write_table

        work = plan(
            config,
            arguments or (),
            warm_start=warm_start,
            warm_iterations=warm_iterations,
            baseline=None if baseline == "none" else baseline,
        )
        try:
            found = run(work, say, evaluate_run)
        except SweepStoppedError as stopped:
            say(f"{stopped} The same command goes on from there.")
            raise typer.Exit(INTERRUPTED) from None
        write_table(found)
        page = write_page(found.folders, work.folder / "index.html") if found.folders else None
        console().print(table(found))
        for line in legend(found):
            console().print(shown(line), soft_wrap=True)
        say(f"{f'Page: {page}   ' if page else ''}numbers: {work.folder / 'sweep.json'}")
        if found.failed:
            raise typer.Exit(1)
