"""Evaluate subjects: load, measure, write; `summary.py` computes, `terminal.py` shows, `written.py` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from diffusion_rtb.evaluation.choice import PICTURED, spread
from diffusion_rtb.evaluation.comparison_table import comparison
from diffusion_rtb.evaluation.features import Reference, features_of_files, real_images
from diffusion_rtb.evaluation.kept import KeptParts
from diffusion_rtb.evaluation.metric import Metric, metrics_of, scorer_of
from diffusion_rtb.evaluation.metrics.judges import JudgesMetric
from diffusion_rtb.evaluation.samples import Drawn, Pictured, Sampled, Side, Tools, measure
from diffusion_rtb.evaluation.subject import Loaded, Options, Subject, load_tools
from diffusion_rtb.evaluation.subjects.run import RunSubject
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.evaluation.terminal import show
from diffusion_rtb.evaluation.written import write_evaluation
from diffusion_rtb.files.evaluations import SCHEMA
from diffusion_rtb.files.pictures import save_png, side_by_side
from diffusion_rtb.files.terminal import console, say
from diffusion_rtb.files.whole import write_json
from diffusion_rtb.run.manifest import versions
from diffusion_rtb.sampling.exact_profile import exact_profile

__all__ = ["evaluate_all", "evaluate_run", "evaluate_subject", "sheet_of", "show"]

Advance = Callable[[int], None]


def evaluate_run(
    run: Path, overrides: Sequence[str] = (), judges: Sequence[str] = (), *, checkpoint: str = "latest"
) -> dict[str, Any]:
    """Measure a run's posterior against its prior; write RUN/eval/ and the model card; print the tables.

    The same command twice writes the same metrics.json byte for byte: times go to timing.json. Which `checkpoint`: see
    `open_trained_run`.

    Raises:
        ValueError: the folder is no run, has no complete checkpoint, or its config is not the one that was trained.
        FolderInUseError: it is being trained or evaluated.
        DiskError: results cannot be written.
    """
    return evaluate_subject(RunSubject(Path(run), Options(overrides, judges, checkpoint)))


def evaluate_subject(subject: Subject) -> dict[str, Any]:
    """Measure one subject, write its folder and print its tables; see `evaluate_run`."""
    start = perf_counter()
    with subject.held():
        metrics = _metrics(subject)
        for metric in metrics:
            metric.prepare(subject.table.texts, subject.table.metadata)
        real = real_images(subject.eval)
        tools = load_tools(subject.tools, subject.eval, scorer_of(metrics))
        loaded = subject.load()
        parts = KeptParts(subject.folder, _depends(subject))
        with _kept_said(parts):
            sides = _measured(subject, loaded, tools, parts)
        if real:
            features = features_of_files(tools.embedder, real, subject.eval.batch, loaded.posterior.device)
            for metric in metrics:
                metric.reference = Reference(features, len(subject.table))
        before, after = (sides[side][0] if side in sides else Drawn.none() for side in ("prior", "posterior"))
        after = replace(after, exact_profile=_exact_profile(subject, loaded))
        sampled = isinstance(loaded.posterior, Sampled)
        numbers = summarise(before, after, subject.table.texts, subject.beta, subject.eval, metrics, sampled=sampled)
        numbers = {"schema": SCHEMA, "subject": _described(subject, loaded)} | numbers | dict(subject.facts)
        show(numbers, metrics, console())
        write_evaluation(subject.folder, numbers, sides)
        sheet = sheet_of({side: shown for side, (_, shown) in sides.items()}, subject.table.texts)
        save_png(sheet, subject.folder / "side_by_side.png")
        loaded.finish(numbers, _card(numbers, metrics))
        parts.remove()
        write_json(subject.folder / "timing.json", {"seconds": perf_counter() - start} | dict(loaded.seconds()))
    say(f"Pictures: {subject.folder / 'side_by_side.png'}   numbers: {subject.folder / 'metrics.json'}")
    return numbers


def _metrics(subject: Subject) -> list[Metric]:
    """Those of the config; the judges that a command asks for are also shown where an older config does not name them."""
    metrics = metrics_of(subject.tools.metrics)
    asked = subject.eval.judges and not any(isinstance(metric, JudgesMetric) for metric in metrics)
    return [*metrics, JudgesMetric()] if asked else metrics


def _exact_profile(subject: Subject, loaded: Loaded) -> Float[Tensor, " steps"] | None:
    side = loaded.posterior
    if not isinstance(side, Sampled) or not math.isfinite(subject.beta):
        return None
    return exact_profile(side.sampler, subject.beta, [row for row, _ in side.pairs], side.seeds)


def _described(subject: Subject, loaded: Loaded) -> dict[str, Any]:
    return {
        "kind": subject.kind,
        "name": subject.name,
        "path": str(subject.path),
        "recipe": subject.recipe,
        "sampling": dict(loaded.sampling),
        "seeds": dict(subject.seeds),
        "versions": versions(),
    }


def _depends(subject: Subject) -> dict[str, Any]:
    """What the samples and all that is said of them depend on; how many are in memory at once changes neither."""
    settings = subject.eval.model_dump(mode="json", exclude={"batch", "confidence", "bootstrap"})
    return {"subject": dict(subject.identity), "settings (eval.*)": settings, "versions": versions()}


@contextmanager
def _kept_said(parts: KeptParts) -> Iterator[None]:
    """Say what is not lost when the block is left early."""
    try:
        yield
    except BaseException:
        say(f"What was drawn is kept in {parts.folder}; the same command goes on from there.")
        raise


def _measured(subject: Subject, loaded: Loaded, tools: Tools, parts: KeptParts) -> dict[str, tuple[Drawn, Pictured]]:
    """Both sides, or the posterior alone, each told to its bar."""
    sides = {"prior": loaded.prior, "posterior": loaded.posterior}
    there = {name: side for name, side in sides.items() if side is not None}
    with _progress(there) as advances:
        return {
            name: measure(
                side, subject.eval, tools, advances[name], extremes=name == "posterior", keeper=parts.of(name)
            )
            for name, side in there.items()
        }


@contextmanager
def _progress(sides: Mapping[str, Side]) -> Iterator[Mapping[str, Advance]]:
    """Bars on a terminal, one plain line elsewhere; functions that are told of samples drawn."""
    people = console(stderr=True)
    if not people.is_terminal:
        say(_plan(sides))
        yield {name: (lambda _: None) for name in sides}
        return
    with Progress(console=people, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=len(side)) for name, side in sides.items()}
        yield {name: partial(bars.advance, task) for name, task in tasks.items()}


def _plan(sides: Mapping[str, Side]) -> str:
    prompts = len(next(iter(sides.values())).prompts)
    if not all(isinstance(side, Sampled) for side in sides.values()):
        held = " and ".join(f"{len(side)} {name}" for name, side in sides.items())
        return f"Reading {held} pictures of {prompts} prompts ..."
    counts = [f"{len(side) // prompts} {name}" for name, side in sides.items()]
    return f"Drawing {' and '.join(counts)} samples for each of {prompts} prompts ..."


def sheet_of(sides: Mapping[str, Pictured], evaluated: Sequence[str]) -> Any:
    """Pairs at the same noise, as many per pictured prompt as both sides have, each with its reward; vectors as dots."""
    rows = spread(len(evaluated), PICTURED)
    pairs = {name: side.pairs(len(evaluated)) for name, side in sides.items()}
    pairs |= {} if "prior" in pairs else {"prior": pairs["posterior"]}
    count = min(int((side.prompt == row).sum()) for side in pairs.values() for row in rows)
    images, captions = [], []
    for side in (pairs["prior"], pairs["posterior"]):
        kept = [side[(side.prompt == row).nonzero().flatten()[:count]] for row in rows]
        images.append(Pictured.cat(kept).shown.unflatten(0, (len(rows), count)))
        captions.append([[f"{value:.2f}" for value in part.reward.tolist()] for part in kept])
    return side_by_side(images[0], images[1], [evaluated[row] for row in rows], captions=(captions[0], captions[1]))


def _card(numbers: Mapping[str, Any], metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """What the model card shows, metric -> prior and posterior."""
    found = numbers | numbers["overall"]
    rows = [metric.card(found[metric.name]) for metric in metrics if found[metric.name] is not None]
    return {label: row for table in rows for label, row in table.items()}


def evaluate_all(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Measure each subject into its own folder, and of several print one table."""
    found = []
    for subject in subjects:
        if len(subjects) > 1:
            say(f"{subject.path}: {subject.recipe}.")
        found.append(evaluate_subject(subject))
    if len(subjects) > 1:
        console().print(comparison(found))
    return found
