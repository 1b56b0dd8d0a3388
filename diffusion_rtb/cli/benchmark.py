"""The command `benchmark`: what sampling and training cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_rtb.cli.messages import Traceback, errors_explained, say

__all__ = ["benchmark"]


def benchmark(
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="May be repeated. Default: see below.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", metavar="NAME", help="bfloat16, float16, tf32, float32; may be repeated. Default: all."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", metavar="NAME", help="Measure this part again, or all whose names begin so; see --list."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the parts and what is known of them, and stop.")] = False,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time in all.")] = 8.0,
    part_minutes: Annotated[float, typer.Option(min=0.0, help="Time for one part.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Folder of benchmark.json and benchmark.md.")] = Path("runs/benchmark"),
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1. Default: the GPU if there is one.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="A YAML file with rows of your own, as diffusion_rtb/benchmark/models.yaml.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """What do sampling and training cost on this machine?

    Images per second of the bare pipeline and under the recorder, seconds and peak memory of an iteration by batch, steps and
    dtype, the share of the machine's own matrix rate, the rounding floor, how often the host waits, torch.compile.

    Models: emoji (comes with this package), and sd15, sdxl, sd35_medium, flux1_dev in their published architectures with random
    weights: nothing is downloaded. The default is emoji on a CPU and the others on a GPU.

    Each part is written at once. The same command goes on where it stopped: with what had no time, or failed. A part that would
    not fit into the time is left out and says so; one without room in memory says that.

    **Examples**

        diffusion-rtb benchmark

        diffusion-rtb benchmark --model sdxl --dtype bfloat16 --minutes 4

        diffusion-rtb benchmark --part sd15-bfloat16-iteration --out runs/again
    """
    with errors_explained(traceback):
        from diffusion_rtb.benchmark.choice import Asked
        from diffusion_rtb.benchmark.run import run_benchmark

        out = out.expanduser()
        asked = Asked(model or (), dtype or (), part or (), minutes * 60, part_minutes * 60, device, models)
        found = run_benchmark(asked, out, say, only_list=show)
        typer.echo(found.text, nl=False)
        if not show:
            say(f"The numbers are in {out / 'benchmark.json'}, the tables in {out / 'benchmark.md'}.")
        if found.failed:
            say(f"{len(found.failed)} parts failed: {', '.join(found.failed)}.", style="bold red")
            raise typer.Exit(1)
