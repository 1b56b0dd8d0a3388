"""The command `sample`: pictures of a posterior, of a prior, or of a prior that is steered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_rtb.cli.messages import Traceback, WhichCheckpoint, errors_explained, say
from diffusion_rtb.config.load import ConfigError, RunConfig
from diffusion_rtb.config.prompts import check_prompt

if TYPE_CHECKING:
    from diffusion_rtb.steering import Method, Steered

__all__ = ["sample"]


def sample(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run; with --prior or --steer also a config.")
    ],
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
    steer: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Steer the prior: best_of, smc, … or {component: smc, particles: 32}."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="With --steer, instead of the run's.")] = None,
    traceback: Traceback = False,
) -> None:
    """Draw images from the posterior of RUN, or from its prior, one PNG each.

    With --steer they are drawn towards RUN's reward without training: RUN may be a config, and of a run that was trained its
    prior is steered. How good that is, what it costs and which method is for what: docs/steering.md.

    A run's config is code: it names Python to import and call. Look at what somebody else gave you before you open it.

    **Examples**

        diffusion-rtb sample runs/quickstart --prompt "a cat emoji" -n 8 --out cats

        diffusion-rtb sample runs/quickstart --prior --prompt "a cat emoji" -n 8 --out cats-before

        diffusion-rtb sample configs/quickstart.yaml --steer "{component: smc, particles: 32}" -n 8 --out cats-steered
    """
    with errors_explained(traceback):
        if prior and checkpoint != "latest":
            raise ConfigError(f"--checkpoint {checkpoint} is one of the posterior: leave it out, or --prior.")
        asked = _Asked(run.expanduser(), prompt or (), count, seed, out.expanduser(), overwrite, batch)
        if beta is not None and steer is None:
            raise ConfigError(f"--beta {beta:g} is for --steer: a posterior has the beta that it was trained for.")
        if steer is not None:
            _steer(asked, steer, beta, None if prior else checkpoint)
        else:
            _sample(asked, None if prior else checkpoint)


@dataclass(frozen=True)
class _Asked:
    """What is to be drawn."""

    run: Path
    prompts: Sequence[str]
    count: int
    seed: int
    out: Path
    overwrite: bool
    batch: int | None

    def texts(self, config: RunConfig) -> list[str]:
        """Each prompt once."""
        texts = list(dict.fromkeys(self.prompts or config.prompts.texts()))
        for number, text in enumerate(texts, 1):
            check_prompt(text, f"prompt {number}")
        return texts

    def paths(self, texts: Sequence[str]) -> list[Path]:
        """Where pictures go; none may be there, and the folder can be written."""
        from diffusion_rtb.files.whole import check_writable
        from diffusion_rtb.sampling.images import image_paths

        paths = image_paths(texts, self.count, self.out, overwrite=self.overwrite)
        check_writable(self.out)
        return paths


def _sample(asked: _Asked, checkpoint: str | None) -> None:
    """Of the prior where there is no checkpoint."""
    from diffusion_rtb.files.pictures import write_images
    from diffusion_rtb.out_of_memory import remedied
    from diffusion_rtb.run.folder import find_run
    from diffusion_rtb.run.posterior import load_prior, open_trained_run
    from diffusion_rtb.sampling.images import draw_batches

    trained = None if checkpoint is None else open_trained_run(asked.run, checkpoint=checkpoint)
    config = find_run(asked.run)[0] if trained is None else trained.config
    texts = asked.texts(config)
    paths = asked.paths(texts)
    if trained is not None:
        say(trained.progress.sentence)
    batch = config.eval.batch if asked.batch is None else asked.batch
    with remedied(config, "sample", batch=batch):
        model = load_prior(asked.run)[1] if trained is None else trained.prior()
        write_images(draw_batches(model, texts, asked.count, seed=asked.seed, batch=batch), paths)
    _say_where(paths, asked.out)


def _steer(asked: _Asked, steer: str, beta: float | None, checkpoint: str | None) -> None:
    """Of the prior, towards the reward of a run or of a config."""
    from diffusion_rtb.files.pictures import write_images
    from diffusion_rtb.out_of_memory import remedied
    from diffusion_rtb.steering import steered_images
    from diffusion_rtb.steering._images import check_batch
    from diffusion_rtb.steering._opening import open_steerable

    method = _method(steer)
    opened = open_steerable(asked.run, checkpoint, method)
    config, texts = opened.config, asked.texts(opened.config)
    paths = asked.paths(texts)
    batch = max(config.eval.batch, method.particles) if asked.batch is None else asked.batch
    check_batch(method, batch)
    table = config.prompts.table()
    known = dict(zip(table.texts, table.metadata, strict=True))
    log_z: dict[str, list[float]] = {text: [] for text in texts}

    def told(prompt: str, found: Steered) -> None:
        log_z[prompt].extend([] if found.log_z is None else found.log_z.tolist())

    with remedied(config, "sample", batch=batch):
        prior, reward, tilt = opened.prior(), opened.reward(), opened.beta if beta is None else beta
        images = steered_images(
            prior,
            reward,
            method,
            texts,
            asked.count,
            tilt,
            seed=asked.seed,
            batch=batch,
            metadata=known,
            learned=opened.learned(prior) if method.value != "reward" else None,
            told=told,
        )
        write_images(images, paths)
    _say_log_z(log_z, tilt)
    _say_where(paths, asked.out)


def _method(text: str) -> Method:
    """From a name, or a component in YAML."""
    from diffusion_rtb.config.components import build
    from diffusion_rtb.config.yaml_text import read_yaml

    given = read_yaml(text)
    method: Method = build({"component": given} if isinstance(given, str) else given, "steering")
    return method


def _say_log_z(log_z: dict[str, list[float]], beta: float) -> None:
    """Each prompt's, from all its groups: the log of the mean of unbiased estimates."""
    from math import exp, log

    for prompt, found in log_z.items():
        if found:
            top = max(found)
            mean = top + log(sum(exp(value - top) for value in found) / len(found))
            say(f"log Z {mean:.3f} nats at beta {beta:g}, {len(found)} estimates: {prompt}")


def _say_where(paths: Sequence[Path], out: Path) -> None:
    say(f"{len(paths)} images in {out}, the first is {paths[0].name}.")
