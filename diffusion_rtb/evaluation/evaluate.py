"""Evaluate a run: load, measure, write eval/; `summary.py` computes, `terminal.py` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import Progress

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.evaluation.choice import PICTURED, evaluated_rows, spread
from diffusion_rtb.evaluation.metric import Metric, metrics_of, scorer_of
from diffusion_rtb.evaluation.samples import Pictured, draw
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.evaluation.terminal import show
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.pictures import save_png, side_by_side
from diffusion_rtb.files.terminal import console, say
from diffusion_rtb.files.whole import check_writable, clear_unfinished, write_json
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.out_of_memory import remedied
from diffusion_rtb.run.export import export_posterior
from diffusion_rtb.run.posterior import TrainedRun, open_trained_run
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["evaluate_run", "show"]

PICTURE = 2_000_000
"""Bytes that the sheet and the numbers may take, to know beforehand whether there is room."""

Advance = Callable[[int], None]


def evaluate_run(run: Path, overrides: Sequence[str] = (), *, checkpoint: str = "latest") -> dict[str, Any]:
    """Measure a run's posterior against its prior; write RUN/eval/ and the model card; print the tables.

    The same command twice writes the same metrics.json byte for byte: times go to timing.json. Which `checkpoint`: see
    `open_trained_run`.

    Raises:
        ValueError: the folder is no run, has no complete checkpoint, or its config is not the one that was trained.
        FolderInUseError: it is being trained or evaluated.
        DiskError: results cannot be written.
    """
    start = perf_counter()
    trained = open_trained_run(run, overrides, checkpoint=checkpoint)
    _check_room(trained)
    with folder_lock(trained.folder):
        for place in (trained.folder, trained.folder / "eval"):
            clear_unfinished(place)
        say(trained.progress.sentence)
        with remedied(trained.config, "eval"):
            return _evaluate(trained, start)


def _check_room(run: TrainedRun) -> None:
    """Find out that results cannot be written before hours are spent on them."""
    weights = sum(t.numel() * t.element_size() for t in run.checkpoint.tensors["posterior"].values())
    check_writable(run.folder, needed=weights + PICTURE)
    check_writable(run.folder / "eval", files=("metrics.json", "side_by_side.png", "timing.json"))
    check_writable(run.folder / "lora", files=("README.md",))


def _evaluate(run: TrainedRun, start: float) -> dict[str, Any]:
    config = run.config
    rows, metrics = _rows(config), metrics_of(run.components.metrics)
    table = config.prompts.table()
    for metric in metrics:
        metric.prepare([table.texts[row] for row in rows], [table.metadata[row] for row in rows])
    prior, reward = run.prior(), run.reward()
    embedder: Any = None if run.components.embedder is None else run.components.embedder.build()
    judge: Any = embedder if run.components.judge is None else run.components.judge.build()
    sampler = _sampler(config, rows, prior, reward)
    tools = {"embedder": embedder, "judge": judge, "numbers": rows, "scorer": scorer_of(metrics)}
    counts = (config.eval.prior_samples, config.eval.samples)
    with _progress(sampler.prompts, *counts) as advances:
        before, left = draw(sampler, config.eval, counts[0], config.seed, posterior=False, advance=advances[0], **tools)
        after, right = draw(sampler, config.eval, counts[1], config.seed, posterior=True, advance=advances[1], **tools)
    numbers = summarise(before, after, sampler.prompts, run.progress.beta, config.eval, metrics)
    numbers |= {"run": run.progress.as_json()}
    picture, card = _picture(left, right, sampler.prompts), _card(numbers, metrics)
    show(numbers, metrics, console())
    folder = run.folder / "eval"
    folder.mkdir(exist_ok=True)
    write_json(folder / "metrics.json", numbers)
    save_png(picture, folder / "side_by_side.png")
    export_posterior(config, prior, run.folder, run.progress, evaluation=card)
    write_json(folder / "timing.json", {"seconds": perf_counter() - start} | sampler.stopwatch.read())
    say(f"Pictures: {folder / 'side_by_side.png'}   numbers: {folder / 'metrics.json'}")
    return numbers


def _rows(config: RunConfig) -> list[int]:
    """The prompts that are evaluated, by their rows in the run's table."""
    texts = config.prompts.texts()
    rows = evaluated_rows(config.eval.prompts, texts)
    if len(rows) < len(texts):
        say(f"Evaluated are {len(rows)} of the run's {len(texts)} prompts (eval.prompts).")
    return rows


def _sampler(config: RunConfig, rows: Sequence[int], prior: Prior, reward: Reward) -> Sampler:
    table = config.prompts.table()
    texts, metadata = [table.texts[row] for row in rows], [table.metadata[row] for row in rows]
    return Sampler(prior, reward, texts, config.eval.batch, metadata)


@contextmanager
def _progress(prompts: Sequence[str], prior: int, posterior: int) -> Iterator[tuple[Advance, Advance]]:
    """Bars on a terminal, one plain line elsewhere; two functions that are told of samples drawn."""
    people = console(stderr=True)
    if not people.is_terminal:
        say(f"Drawing {prior} prior and {posterior} posterior samples for each of {len(prompts)} prompts ...")
        yield (lambda _: None), (lambda _: None)
        return
    with Progress(console=people, transient=True) as bars:
        tasks = [bars.add_task(n, total=len(prompts) * k) for n, k in (("prior", prior), ("posterior", posterior))]
        yield (lambda n: bars.advance(tasks[0], n)), (lambda n: bars.advance(tasks[1], n))


def _picture(prior: Pictured, posterior: Pictured, evaluated: Sequence[str]) -> Any:
    """Pairs at the same noise, as many per pictured prompt as both sides have, each with its reward; vectors as dots."""
    prompts = [evaluated[row] for row in spread(len(evaluated), PICTURED)]
    kept = [len(side) // len(prompts) for side in (prior, posterior)]
    count = min(kept)
    images, captions = [], []
    for side, held in zip((prior, posterior), kept, strict=True):
        shape = (len(prompts), held, *side.image.shape[1:])
        images.append(side.image.reshape(shape)[:, :count])
        rewards = side.reward.reshape(len(prompts), held)[:, :count]
        captions.append([[f"{value:.2f}" for value in row] for row in rewards.tolist()])
    return side_by_side(images[0], images[1], prompts, captions=(captions[0], captions[1]))


def _card(numbers: Mapping[str, Any], metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """What the model card shows, metric -> prior and posterior."""
    found = numbers | numbers["overall"]
    rows = [metric.card(found[metric.name]) for metric in metrics if found[metric.name] is not None]
    return {label: row for table in rows for label, row in table.items()}
