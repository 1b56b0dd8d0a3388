"""The commands: what they accept, and how they speak about errors. The work is done elsewhere.

Heavy modules are imported inside the commands, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffusion_rtb import __version__
from diffusion_rtb.cli.benchmark import benchmark
from diffusion_rtb.cli.compare import CompareCommand, compare
from diffusion_rtb.cli.doctor import doctor
from diffusion_rtb.cli.evaluate import EvalCommand, evaluate
from diffusion_rtb.cli.messages import INTERRUPTED, Traceback, errors_explained, say
from diffusion_rtb.cli.page import page
from diffusion_rtb.cli.rewards import check_reward, serve_reward
from diffusion_rtb.cli.sample import sample
from diffusion_rtb.cli.sweep import sweep
from diffusion_rtb.config.load import ConfigError, RunConfig, config_schema, config_text, load_config

__all__ = ["app", "eval_main", "main", "train_main"]

app = typer.Typer(
    name="diffusion-rtb",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Fine-tune a diffusion model (the prior) towards the posterior p(x)·exp(beta·r(x)) / Z of a reward r.",
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override keys; values in YAML: train.lr=1e-4 train.grid_every=0"),
]


def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")] = False,
    traceback: Traceback = False,
) -> None:
    """Fine-tune the posterior of CONFIG; the run's folder is `out/name` of the config, runs/NAME by default.

    A run that was interrupted goes on from its latest checkpoint, with the same numbers, when the command is given again.
    With a run's folder as CONFIG, that run goes on, wherever the folder lies now.
    Ctrl-C finishes the iteration and writes a checkpoint; a second Ctrl-C stops at once.

    A config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    In the run's folder: config.yaml (resolved), metrics.jsonl (one line per iteration), samples/ (pictures),
    checkpoints/, lora/ (load it with plain diffusers: `pipe.load_lora_weights("runs/NAME/lora")`) or, with
    posterior.full=true, posterior/ with the trained network; README.md there has the code.

    **Examples**

        diffusion-rtb train configs/quickstart.yaml

        diffusion-rtb train configs/quickstart.yaml name=hotter beta=2.0 train.iterations=200

        python train.py configs/quickstart.yaml             # the same in a clone

        torchrun --nproc_per_node 2 train.py configs/quickstart.yaml  # two GPUs, or processes
    """
    with errors_explained(traceback):
        if print_config:
            typer.echo(config_text(load_config(config, overrides or ())), nl=False)
            return
        from diffusion_rtb.run.export import export_posterior
        from diffusion_rtb.run.folder import find_run
        from diffusion_rtb.training.assemble import training

        run, folder = find_run(config, overrides or ())
        _say_merged(run)
        with training(run, folder) as trainer:
            trainer.fit()
            trainer.processes.leave()
            if trainer.interrupted:
                done = f"{trainer.iteration} of {run.train.iterations} iterations"
                say(f"Stopped after {done}{trainer.stopped or '; the same command goes on from there'}.")
                raise typer.Exit(INTERRUPTED)
            if trainer.processes.main:
                with trainer.final():
                    handed = export_posterior(run, trainer.prior, folder, trainer.progress)
                pictures = f", pictures in {folder / 'samples'}" if (folder / "samples").is_dir() else ""
                say(f"The posterior is in {handed}{pictures}. Next: python eval.py {folder}")


def show_config(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file, or the folder of a run.")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of config files instead.")] = False,
    traceback: Traceback = False,
) -> None:
    """Check CONFIG and print it with every default filled in.

    A config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    **Examples**

        diffusion-rtb config configs/quickstart.yaml train.lr=1e-4

        diffusion-rtb config --schema > config.schema.json
    """
    with errors_explained(traceback):
        if schema:
            import json

            typer.echo(json.dumps(config_schema(), indent=2))
            return
        if config is None:
            raise ConfigError("Which config? Give a YAML file or a run's folder, or --schema.")
        run = load_config(config, overrides or ())
        from diffusion_rtb.run.folder import run_folder
        from diffusion_rtb.training.assemble import check_run

        check_run(run, config if config.is_dir() else run_folder(run))
        _say_merged(run)
        typer.echo(config_text(run), nl=False)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Options before the command; without this function there would be no --version.
    return


app.command("train")(train)
app.command("page")(page)
app.command("eval", cls=EvalCommand)(evaluate)
app.command("sample")(sample)
app.command("config")(show_config)
app.command("doctor")(doctor)
app.command("compare", cls=CompareCommand)(compare)
app.command("sweep")(sweep)
app.command("check-reward")(check_reward)
app.command("benchmark")(benchmark)
app.command("serve-reward")(serve_reward)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `diffusion-rtb`."""
    _settle()
    app(args=argv, prog_name="diffusion-rtb")


def train_main(argv: Sequence[str] | None = None) -> None:
    """`python train.py CONFIG [KEY=VALUE]...`: the command `train` alone."""
    _settle()
    _alone(train)(args=argv, prog_name="python train.py")


def eval_main(argv: Sequence[str] | None = None) -> None:
    """`python eval.py RUN [KEY=VALUE]...`: the command `eval` alone."""
    _settle()
    _alone(evaluate, EvalCommand)(args=argv, prog_name="python eval.py")


def _alone(command: Callable[..., Any], kind: type[TyperCommand] = TyperCommand) -> typer.Typer:
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command(cls=kind)(command)
    return single


def _settle() -> None:
    # Modules of the user's own, named in a config, are looked for where the command was given, after everything else.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding gets escapes instead of an error
        sys.stdout.reconfigure(errors="backslashreplace")


def _say_merged(run: RunConfig) -> None:
    merged = run.prompts.table().merged
    if merged and os.environ.get("RANK", "0") == "0":  # one of several processes
        say(
            f"{run.prompts.file}: {len(run.prompts.texts())} different prompts; {merged} lines that repeat one count once."
        )
