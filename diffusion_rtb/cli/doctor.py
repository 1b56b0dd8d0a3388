"""The command `doctor`: will this run work, and what does it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion_rtb.cli.messages import Traceback, errors_explained, say

__all__ = ["doctor"]


def doctor(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Override keys, as for train: train.micro_batch=8"),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many would train together, for the arithmetic.")] = 1,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write everything that was found to this file; -: to the output.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Will the run of CONFIG work, and what does it cost? Looked at before its first hour; leaves with 1 if it will not.

    Checks the config as train does, plans the memory by component, asks the reward about samples of the prior, makes two dry
    iterations and puts everything back, and says from them precision, seconds, memory and disk. Each finding is `ok`, worth a
    `look`, or a `stop`, with the setting that helps. Nothing is written into the run's folder.

    A config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    **Examples**

        diffusion-rtb doctor configs/quickstart.yaml

        diffusion-rtb doctor configs/sd15_clip.yaml train.micro_batch=8 --json doctor.json
    """
    with errors_explained(traceback):
        from json import dumps

        from diffusion_rtb.doctor.report import examine_run
        from diffusion_rtb.doctor.terminal import show_examined, show_sentence
        from diffusion_rtb.files.terminal import console
        from diffusion_rtb.files.whole import check_writable, write_json
        from diffusion_rtb.run.folder import find_run

        piped = json is not None and str(json) == "-"
        file = None if json is None or piped else json.expanduser()
        if file is not None:
            check_writable(file.parent, files=(file.name,))
        run, folder = find_run(config, overrides or (), restore=False)
        page = console(stderr=piped)
        with (page if page.is_terminal else console(stderr=True)).status("") as status:
            report = examine_run(
                run,
                folder,
                processes=processes,
                told=lambda name, found: show_examined(name, found, page),
                begins=lambda name: status.update(f"examining {name} ..."),
            )
        show_sentence(report.sentence, report.verdict, page)
        if piped:
            typer.echo(dumps(report.as_json(), indent=1, allow_nan=False))
        elif file is not None:
            write_json(file, report.as_json())
            say(f"Everything that was found is in {file}.")
        if report.verdict == "stop":
            raise typer.Exit(1)
