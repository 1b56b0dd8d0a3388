"""Measure part by part inside a budget: a part that would not fit is left out and says so, one without room in memory too."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffusion_rtb.benchmark.choice import Asked, choose
from diffusion_rtb.benchmark.compiled import measure_compiled
from diffusion_rtb.benchmark.device import describe_machine, precision
from diffusion_rtb.benchmark.expected import expected_seconds
from diffusion_rtb.benchmark.floor import measure_floor
from diffusion_rtb.benchmark.iteration import measure_iteration, measure_update
from diffusion_rtb.benchmark.network import measure_network
from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.benchmark.rate import measure_rate
from diffusion_rtb.benchmark.results import Results
from diffusion_rtb.benchmark.sampling import measure_sampling
from diffusion_rtb.benchmark.subject import Subject
from diffusion_rtb.benchmark.table import markdown, state
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.whole import write_text
from diffusion_rtb.out_of_memory import is_out_of_memory

__all__ = ["Budget", "Found", "measure_parts", "run_benchmark"]


@dataclass(frozen=True)
class Found:
    """What the command shows."""

    text: str
    failed: Sequence[str] = ()


def run_benchmark(
    asked: Asked, out: Path, tell: Callable[[str], None] = lambda _: None, *, only_list: bool = False
) -> Found:
    """Measure what was asked for and is not in `out` yet; parts that were asked for by name are measured again.

    Raises:
        ValueError: there is no such model, dtype, part or device; `out` holds results of another machine.
    """
    parts, device = choose(asked)
    results = Results(out, describe_machine(device))
    if only_list:
        return Found(_listed(parts, results))
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        for part in parts if asked.parts else ():
            results.parts.pop(part.name, None)
        measure_parts(parts, results, Budget(asked.seconds, asked.part_seconds), device, tell)
        text = markdown(results.machine, results.parts)
        write_text(out / "benchmark.md", text)
    return Found(text, [part.name for part in parts if "failed" in results.parts.get(part.name, {})])


def _listed(parts: Sequence[Part], results: Results) -> str:
    width = max((len(part.name) for part in parts), default=0)
    lines = []
    for part in parts:
        expected = f"about {expected_seconds(part, results.parts, loaded=True):.0f} s"
        lines.append(f"{part.name:{width}}  {state(results.parts.get(part.name)) or expected}")
    return "\n".join(lines) + "\n"


@dataclass
class Budget:
    """How long it may take.

    Args:
        seconds: In all, from now on.
        part_seconds: For one part.
    """

    seconds: float
    part_seconds: float

    def __post_init__(self) -> None:
        self._end = perf_counter() + self.seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - perf_counter()

    def refusal(self, expected: float) -> str | None:
        """Why a part of so many seconds is not begun; None: it is."""
        if expected > self.part_seconds:
            return f"too long: about {expected:.0f} s, a part may take {self.part_seconds:.0f} s (--part-minutes)"
        if self.left <= 0 or expected > self.left:
            return f"no time: about {expected:.0f} s, {max(self.left, 0):.0f} s are left; the same command goes on"
        return None


def measure_parts(
    parts: Sequence[Part],
    results: Results,
    budget: Budget,
    device: torch.device,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure what is not there yet, in this order; each result is written at once.

    Args:
        parts: See `plan`.
        results: What there is; they grow.
        budget: Time in all and for one part.
        device: Where to measure.
        tell: Told of every part in a sentence.
    """
    held = _Held(device)
    for part in parts:
        if results.done(part.name):
            continue
        expected = expected_seconds(part, results.parts, loaded=held.holds(part))
        refusal = budget.refusal(expected)
        most = min(budget.left, budget.part_seconds)
        found = _measured(part, held, results, most) if refusal is None else {"skipped": refusal}
        results.put(part.name, part.facts | found)
        tell(f"{part.name}: {_said(found)}")
    held.release()


def _said(found: dict[str, Any]) -> str:
    for key in ("skipped", "failed", "out_of_memory"):
        if key in found:
            return f"{key.replace('_', ' ')}: {found[key]}"
    return f"{found['took']:.1f} s"


def _measured(part: Part, held: _Held, results: Results, most: float) -> dict[str, Any]:
    """A part's result; what goes wrong is one too, so that the others are still measured."""
    start = perf_counter()
    try:
        with precision(part.dtype), _stopped_after(most):
            found = _measure(part, held, results)
    except _TooLongError:
        found = {"skipped": f"stopped after {perf_counter() - start:.0f} s, when its time was over"}
    except Exception as error:  # noqa: BLE001 — whatever fails in one part, the others are measured
        where = f"at batch {part.batch}" if part.batch else ""
        found = {"out_of_memory": where} if is_out_of_memory(error) else {"failed": f"{type(error).__name__}: {error}"}
    if {"out_of_memory", "failed", "skipped"} & found.keys():
        held.release()  # outside `except`: the error holds the frames that hold the tensors
    return found | {"took": perf_counter() - start}


class _TooLongError(Exception):
    pass


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Leave the block when it takes longer than expected, as compiling may, where the system has alarms."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    fired: list[bool] = []

    def stop(number: int, frame: Any) -> None:
        fired.append(True)
        raise _TooLongError

    before, first = signal.signal(signal.SIGALRM, stop), max(seconds, 0.001)
    # Again and again: whoever is running may swallow the error.
    signal.setitimer(signal.ITIMER_REAL, first, min(first, 1.0))
    try:
        yield
    except Exception as error:
        if fired:  # or have made another one of it
            raise _TooLongError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _measure(part: Part, held: _Held, results: Results) -> dict[str, Any]:
    if part.measure == "rate":
        return measure_rate(part.dtype, held.device)
    subject, rate = held.subject(part), results.rate(part.dtype)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "network": partial(measure_network, subject, part, rate),
        "sampling": partial(measure_sampling, subject, part, rate),
        "iteration": partial(measure_iteration, subject, part, rate),
        "update": partial(measure_update, subject, part),
        "floor": partial(measure_floor, subject, part),
        "compiled": partial(measure_compiled, subject, part),
    }
    return measures[part.measure]()


class _Held:
    """The subject of the part before, kept for the next one of the same model, dtype and steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._subject: Subject | None = None

    def holds(self, part: Part) -> bool:
        return self._subject is not None and self._subject.key == Subject.key_of(part)

    def subject(self, part: Part) -> Subject:
        if self._subject is None or not self.holds(part):
            self.release()
            self._subject = Subject(part, str(self.device))
        return self._subject

    def release(self) -> None:
        self._subject = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
