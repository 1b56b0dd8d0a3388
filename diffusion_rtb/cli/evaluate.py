"""The command `eval`: runs, LoRAs and folders of pictures, each measured into its own folder, then side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffusion_rtb.cli.messages import Traceback, WhichCheckpoint, errors_explained, say
from diffusion_rtb.config.load import ConfigError

__all__ = ["EvalCommand", "evaluate"]


class EvalCommand(TyperCommand):
    """A command whose `--judges` takes several names after one flag, up to the next option, override or path."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further name; one with `=` or `/`, or that lies on the disk, is none."""
        spread: list[str] = []
        taking = fresh = False
        for argument in args:
            name = not (argument.startswith("-") or "=" in argument or "/" in argument)
            if taking and not fresh and name and not Path(argument).exists():
                spread.append("--judges")
            elif not fresh:
                taking = False
            fresh = argument == "--judges"
            taking = taking or fresh
            spread.append(argument)
        return super().parse_args(ctx, spread)


def evaluate(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="SUBJECT...", help="Runs, LoRAs, folders of pictures; and overrides eval.key=value, in YAML."
        ),
    ],
    judges: Annotated[
        list[str] | None, typer.Option("--judges", metavar="NAME...", help="Held-out rewards, instead of eval.judges.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Of a LoRA: its prior, reward and prompts; of pictures: their reward and beta.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="Of pictures, by name or {component: NAME, ...}.")] = None,
    against: Annotated[Path | None, typer.Option(help="Pictures of the prior, for pictures.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where results go: RUN/eval or evaluations/NAME by default; of several, OUT/NAME."),
    ] = None,
    checkpoint: WhichCheckpoint = "latest",
    traceback: Traceback = False,
) -> None:
    """Compare prior and posterior of each SUBJECT at the same prompts and seeds.

    A SUBJECT is the folder of a run; a LoRA that any tool has made, on the prior of --config; or a folder of pictures
    with a metadata.jsonl, a line {file_name, prompt, seed} each. What a subject has no numbers for is left out, and said.

    Measures reward, held-out judges, diversity, KL, ELBO, ESS and the proportions the config asks for, each with its
    uncertainty, and writes metrics.json, samples.safetensors, pictures and one page.html of all; of a run into RUN/eval,
    and lora/ anew from the checkpoint evaluated. A command that was interrupted goes on from what it had drawn when it is
    given again.

    A config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    **Examples**

        diffusion-rtb eval runs/quickstart

        diffusion-rtb eval runs/quickstart runs/hotter eval.samples=400 --judges aesthetic jpeg

        diffusion-rtb eval lora.safetensors --config configs/sd15_clip.yaml

        diffusion-rtb eval pictures --reward aesthetic --against pictures-before
    """
    with errors_explained(traceback):
        _evaluate(subjects, judges or (), config, reward, against, out, checkpoint)


def _evaluate(
    subjects: Sequence[str],
    judges: Sequence[str],
    config: Path | None,
    reward: str | None,
    against: Path | None,
    out: Path | None,
    checkpoint: str,
) -> None:
    overrides = [text for text in subjects if "=" in text and not Path(text).exists()]
    _only(overrides, "eval.")
    paths = [Path(text) for text in subjects if text not in overrides]
    if not paths:
        raise ConfigError("What is to be evaluated? Give the folder of a run, a LoRA, or a folder of pictures.")
    from diffusion_rtb.evaluation.evaluate import evaluate_all
    from diffusion_rtb.evaluation.subject import Options
    from diffusion_rtb.evaluation.subjects._opening import open_subjects
    from diffusion_rtb.report.page import write_page

    opened = open_subjects(paths, Options(overrides, judges, checkpoint, config, reward, against, out))
    evaluate_all(opened)
    place = opened[0].folder if len(opened) == 1 else out or Path("evaluations")
    say(f"Page: {write_page([subject.folder for subject in opened], place / 'page.html')}")


def _only(overrides: Sequence[str], prefix: str) -> None:
    for override in overrides:
        if not override.startswith(prefix):
            raise ConfigError(
                f"Override {override!r}: a trained run's config is fixed, only {prefix}* keys can be changed."
            )
