"""Images per second of the bare pipeline and under the recorder, alternating, at the same seeds; decoding is part of it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_rtb.benchmark.device import counted, peak_memory, settled, shared, typical, waits
from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.seeds import generators, global_seed

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["images", "measure_sampling"]

ENOUGH, PAIRS = 10.0, 3
"""Seconds after which no further pair is begun, and pairs at most."""


def images(subject: Subject, batch: int, *, recorded: bool) -> Tensor:
    """What the stock pipeline draws from fixed seeds, as the prior."""
    prior, rows = subject.prior, generators(range(batch))
    pipe = prior.pipe
    recorder = TrajectoryRecorder(pipe.scheduler, dtype=torch.float64, generators=rows) if recorded else nullcontext()
    with torch.no_grad(), global_seed(0), prior.as_prior(), recorder:
        found = pipe(**prior.arguments(subject.prompts(batch)), generator=rows, output_type="pt", return_dict=False)[0]
    assert isinstance(found, Tensor)
    return found


def measure_sampling(subject: Subject, part: Part, rate: float | None) -> dict[str, Any]:
    """Both ways once to warm up, once to count, then in pairs; the two ways' images are compared bit for bit."""
    device, batch = subject.device, part.batch
    bare: list[Tensor] = []
    flop = counted(lambda: bare.append(images(subject, batch, recorded=False)))
    same = torch.equal(bare[0], images(subject, batch, recorded=True))
    counts = {way: waits(partial(images, subject, batch, recorded=way), device) for way in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}

    def pair() -> None:
        for way, found in seconds.items():
            start = perf_counter()
            images(subject, batch, recorded=way)
            settled(device)
            found.append(perf_counter() - start)

    peak = peak_memory(pair, device)
    while len(seconds[True]) < PAIRS and sum(map(sum, seconds.values())) < ENOUGH:
        pair()
    plain, recorded = (typical(seconds[way]) for way in (False, True))
    return {
        "runs": len(seconds[True]),
        "images_per_second": batch / plain,
        "images_per_second_recorded": batch / recorded,
        "overhead": typical([b / a - 1 for a, b in zip(seconds[False], seconds[True], strict=True)]),
        "same_images": same,
        "waits_per_step": _per_step(counts[False], part.steps),
        "waits_per_step_recorded": _per_step(counts[True], part.steps),
        "peak_memory": peak,
        "flop": flop,
    } | shared(flop, plain, rate)


def _per_step(count: int | None, steps: int) -> float | None:
    return None if count is None else count / steps
