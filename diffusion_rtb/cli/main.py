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
from diffusion_rtb.cli.evaluate import EvalCommand, WhichCheckpoint, evaluate
from diffusion_rtb.cli.messages import INTERRUPTED, Traceback, errors_explained, say
from diffusion_rtb.cli.page import page
from diffusion_rtb.cli.rewards import check_reward, serve_reward
from diffusion_rtb.cli.sweep import sweep
from diffusion_rtb.config.load import ConfigError, RunConfig, config_schema, config_text, load_config
from diffusion_rtb.config.prompts import check_prompt

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
    checkpoints/, lora/ (load it with plain diffusers: `pipe.load_lora_weights("runs/NAME/lora")`).

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
            if trainer.interrupted:
                done = f"{trainer.iteration} of {run.train.iterations} iterations"
                say(f"Stopped after {done}{trainer.stopped or '; the same command goes on from there'}.")
                raise typer.Exit(INTERRUPTED)
            if trainer.processes.main:
                lora = export_posterior(run, trainer.prior, folder, trainer.progress)
                pictures = f", pictures in {folder / 'samples'}" if (folder / "samples").is_dir() else ""
                say(f"The posterior is in {lora}{pictures}. Next: python eval.py {folder}")


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run; with --prior also a config.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: the prompts of the run.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same noise, for prior and posterior.")] = 0,
    prior: Annotated[bool, typer.Option("--prior", help="Sample the prior instead of the posterior.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace PNG files that are there.")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images drawn at once. Default: eval.batch of the run.")
    ] = None,
    checkpoint: WhichCheckpoint = "latest",
    traceback: Traceback = False,
) -> None:
    """Draw images from the posterior of RUN, or from its prior, one PNG each.

    A run's config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    **Examples**

        diffusion-rtb sample runs/quickstart --prompt "a cat emoji" -n 8 --out cats

        diffusion-rtb sample runs/quickstart --prior --prompt "a cat emoji" -n 8 --out cats-before
    """
    with errors_explained(traceback):
        if prior and checkpoint != "latest":
            raise ConfigError(f"--checkpoint {checkpoint} is one of the posterior: leave it out, or --prior.")
        _sample(run, prompt, count, seed, out, overwrite, batch, None if prior else checkpoint)


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


def _sample(
    run: Path,
    prompts: Sequence[str] | None,
    count: int,
    seed: int,
    out: Path,
    overwrite: bool,
    batch: int | None,
    checkpoint: str | None,
) -> None:
    """Of the prior where there is no checkpoint."""
    from diffusion_rtb.files.pictures import write_images
    from diffusion_rtb.files.whole import check_writable
    from diffusion_rtb.out_of_memory import remedied
    from diffusion_rtb.run.folder import find_run
    from diffusion_rtb.run.posterior import load_prior, open_trained_run
    from diffusion_rtb.sampling.images import draw_batches, image_paths

    out = out.expanduser()
    trained = None if checkpoint is None else open_trained_run(run, checkpoint=checkpoint)
    config = find_run(run)[0] if trained is None else trained.config
    texts = list(dict.fromkeys(prompts)) if prompts else list(config.prompts.texts())
    for number, text in enumerate(texts, 1):
        check_prompt(text, f"prompt {number}")
    paths = image_paths(texts, count, out, overwrite=overwrite)
    check_writable(out)
    if trained is not None:
        say(trained.progress.sentence)
    batch = config.eval.batch if batch is None else batch
    with remedied(config, "sample", batch=batch):
        model = load_prior(run)[1] if trained is None else trained.prior()
        write_images(draw_batches(model, texts, count, seed=seed, batch=batch), paths)
    say(f"{len(paths)} images in {out}, the first is {paths[0].name}.")
