"""The command `page`: what was evaluated as one HTML file to send around."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_rtb.cli.messages import Traceback, errors_explained, say

__all__ = ["page"]


def page(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Evaluated runs, or folders that eval wrote (--out).")
    ],
    out: Annotated[Path, typer.Option(help="The file.")] = Path("eval.html"),
    traceback: Traceback = False,
) -> None:
    """Make the page of one or several evaluations again, from what they have written; nothing is drawn or loaded.

    One self-contained HTML file: verdict, pictures at equal seeds, histograms, frontier, prompts, training curves, settings.
    It opens from disk and loads nothing from elsewhere.

    **Examples**

        diffusion-rtb page runs/quickstart --out quickstart.html

        diffusion-rtb page runs/quickstart runs/hotter --out both.html
    """
    with errors_explained(traceback):
        from diffusion_rtb.files.whole import check_writable
        from diffusion_rtb.report.page import write_page

        out = out.expanduser()
        check_writable(out.parent, files=(out.name,))
        say(f"Page: {write_page(runs, out)}")
