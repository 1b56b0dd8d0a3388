"""The commands about rewards: check one before training on it, serve one to other processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffusion_rtb.cli.messages import Traceback, errors_explained, say
from diffusion_rtb.files.terminal import console

__all__ = ["check_reward", "serve_reward"]


def check_reward(
    rewards: Annotated[
        list[str],
        typer.Argument(
            metavar="REWARD...",
            help="A name or module:attribute, with its arguments after it, key=value each; {component: NAME, argument: value}; "
            "or a config or run, for its reward.",
        ),
    ],
    images: Annotated[
        Path | None, typer.Option(help="A folder of pictures; prompts in metadata.jsonl or *.txt.")
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="Draw the samples from the prior of this config or run.")] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Ask about vectors of this length instead of pictures.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: those of the samples.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Prompts and their metadata, as prompts.file of a config; all must suit the reward."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=2, help="Samples.")] = 32,
    side: Annotated[int | None, typer.Option("--size", min=16, help="Pixels per side of the pictures.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the samples are, e.g. cpu. Default: the accelerator.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write everything that was found to this file.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Is REWARD fit for training? Every check before a GPU-hour is spent; leaves with 1 if one fails.

    Shape, finiteness, spread, determinism, batches, order, broken samples, precision, device, gradient, speed, memory, and
    whether it only likes large files, brightness or what another reward likes.

    Without --images, --prior or --dim the samples are pictures made for this purpose, the same at every call: of words, with
    prompts that quote them, where a reward reads.

    **Examples**

        diffusion-rtb check-reward jpeg clip_score

        diffusion-rtb check-reward my_reward:Redness scale=2.0

        diffusion-rtb check-reward configs/quickstart.yaml --prior configs/quickstart.yaml --json report.json
    """
    with errors_explained(traceback):
        from diffusion_rtb.files.whole import check_writable, write_json
        from diffusion_rtb.reward_check.report import check_rewards, reward_components
        from diffusion_rtb.reward_check.samples import choose_samples
        from diffusion_rtb.reward_check.terminal import show_reports

        json = None if json is None else json.expanduser()
        if json is not None:
            check_writable(json.parent, files=(json.name,))
        components = reward_components(rewards)
        prompts, known = _prompts(prompt, prompt_file, components, count)
        samples = choose_samples(
            images=images,
            prior=prior,
            dim=dim,
            prompts=prompts,
            count=count,
            side=side,
            rewards=components,
            known=known,
        )
        found = check_rewards(components, samples, device=device)
        show_reports(found, console())
        if json is not None:
            write_json(json, found.as_json())
            say(f"Everything that was found is in {json}.")
        if not found.passed:
            raise typer.Exit(1)


def _prompts(
    given: Sequence[str] | None, file: Path | None, rewards: Sequence[Mapping[str, Any]], count: int
) -> tuple[Sequence[str], dict[str, Mapping[str, Any]] | None]:
    """Prompts and what is known of them; those of a file are shown to the rewards as before training."""
    if file is None:
        return given or (), None
    if given:
        raise ValueError("--prompt and --prompt-file both say what the prompts are: give one of them.")
    from diffusion_rtb.config.prompt_files import find_file, read_prompts
    from diffusion_rtb.scoring.prompts import check_component_prompts

    table = read_prompts(find_file(str(file), "."))
    for component in rewards:
        check_component_prompts(component, table.texts, table.metadata)
    return table.texts[:count], dict(zip(table.texts, table.metadata, strict=True))


def serve_reward(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Arguments of the reward; values in YAML: quality=80"),
    ] = None,
    reward: Annotated[str, typer.Option("--reward", help="A name, or module:attribute.")] = "",
    host: Annotated[str, typer.Option(help="Where to listen; anything but this machine needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8817,
    arrays: Annotated[Literal["torch", "numpy"], typer.Option(help="What the reward takes and returns.")] = "torch",
    device: Annotated[str | None, typer.Option(help="For torch rewards. Default: the GPU if there is one.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images per request at most.")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come again.")] = 16,
    traceback: Traceback = False,
) -> None:
    """Answer other processes' requests for a reward over HTTP, until Ctrl-C. Needs the extra `server`.

    A token, where DIFFUSION_RTB_TOKEN is set, is asked of every client; at least 16 characters, the same for both sides. The client
    is the reward `remote`. A network that is not yours wants a proxy in between, for TLS.

    **Examples**

        diffusion-rtb serve-reward --reward jpeg quality=80

        export DIFFUSION_RTB_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())")

        diffusion-rtb serve-reward --reward my_reward:Redness --host 0.0.0.0
    """
    with errors_explained(traceback):
        from dataclasses import replace

        from diffusion_rtb.remote_reward.messages import Limits
        from diffusion_rtb.remote_reward.serve import Address, Work, component_of, serve

        if not reward:
            raise ValueError("Which reward? Say --reward NAME, e.g. --reward jpeg.")
        limits = Limits() if max_batch is None else replace(Limits(), max_batch=max_batch)
        address = Address(host, port, os.environ.get("DIFFUSION_RTB_TOKEN") or None)
        serve(component_of(reward, arguments or ()), address, Work(arrays, device, limits, max_waiting))
