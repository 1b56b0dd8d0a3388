"""An iteration of the trainer itself: rollout, decoding, reward, log p, gradient and update; and an update on noised samples."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_rtb.benchmark.device import counted, peak_memory, settled, shared, timed, typical, waits
from diffusion_rtb.benchmark.network import first_of
from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.interfaces import States
from diffusion_rtb.training.updates.regression import Regression

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["measure_iteration", "measure_update"]

PHASES = ("rollout", "reward", "score", "backward")
PASSES = 3
"""Over the steps: rollout, log p, gradient."""

ENOUGH, PAIRS = 20.0, 7
"""Seconds after which no further pair is begun, and pairs at most."""


def measure_iteration(subject: Subject, part: Part, rate: float | None) -> dict[str, Any]:
    """One iteration to warm up and count, one for the waits, then timed ones; the numbers are those of the last.

    The posterior is what it was before: others may follow that want the prior.
    """
    trainer = subject.trainer(part)
    before = {name: parameter.detach().clone() for name, parameter in subject.prior.parameters().items()}
    logged: dict[str, float] = {}

    def iterate() -> None:
        # Not the first of a run: that one measures the rounding floor as well.
        trainer.iteration += 1
        logged.update(trainer.step())

    flop = counted(iterate)
    count = waits(iterate, subject.device)
    seconds: list[float] = []
    peak = peak_memory(lambda: seconds.extend(timed(iterate, subject.device, seconds=8.0, most=5)), subject.device)
    for name, parameter in subject.prior.parameters().items():
        parameter.data.copy_(before[name])
    subject.forget_gradients()
    train = trainer.config.train
    trajectories = train.group * train.prompts_per_iteration
    passes = PASSES * part.steps * trajectories // train.micro_batch
    return {
        "trajectories": trajectories,
        "micro_batch": train.micro_batch,
        "runs": len(seconds),
        "seconds": typical(seconds),
        "seconds_of": {phase: logged[f"seconds/{phase}"] for phase in PHASES},
        "parity": logged["parity"],
        "waits_per_step": None if count is None else count / passes,
        "peak_memory": peak,
        "flop": flop,
    } | shared(flop, typical(seconds), rate)


class _Aims:
    """An objective of states that asks for all there is and computes nothing else: RAM at a reward of one nat for every sample."""

    noises = True

    def aim(self, at: States, beta: float) -> Tensor:
        assert at.mean_0 is not None
        return at.means["prior"] + at.mean_0 - at.mean_q


def measure_update(subject: Subject, part: Part) -> dict[str, Any]:
    """K states of each sample of a micro-batch, K all steps, in turns with K calls of q with gradient and K of p alone."""
    sampler, prior = subject.sampler(part.batch), subject.prior
    parts = {"posterior": sampler.draw(subject.rows(part.batch), list(range(part.batch)))}
    states = int(parts["posterior"].trajectory.stochastic.sum())
    regression = Regression(sampler, _Aims(), 1.0, {"prior": prior.as_prior})
    args, kwargs = subject.network_call(part.batch)
    network = subject.network

    def update() -> None:
        regression.push(parts, None, 0)

    def calls() -> None:
        for _ in range(states):
            with torch.no_grad(), prior.as_prior():
                network(*args, **kwargs)
            first_of(network(*args, **kwargs)).float().square().mean().backward()

    flop = counted(update), counted(calls)
    peak = peak_memory(update, subject.device)
    seconds: tuple[list[float], list[float]] = ([], [])
    while len(seconds[0]) < PAIRS and sum(map(sum, seconds)) < ENOUGH:
        for action, found in zip((update, calls), seconds, strict=True):
            start = perf_counter()
            action()
            settled(subject.device)
            found.append(perf_counter() - start)
    subject.forget_gradients()
    return {
        "states": states,
        "runs": len(seconds[0]),
        "seconds": typical(seconds[0]),
        "seconds_of_calls": typical(seconds[1]),
        "overhead": typical([a / b - 1 for a, b in zip(*seconds, strict=True)]),
        "peak_memory": peak,
        "flop": flop[0],
        "flop_of_calls": flop[1],
    }
