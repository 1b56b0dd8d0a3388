"""An iteration of the trainer itself: rollout, decoding, reward, log p, gradient and update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusion_rtb.benchmark.device import counted, peak_memory, shared, timed, typical, waits
from diffusion_rtb.benchmark.plan import Part

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["measure_iteration"]

PHASES = ("rollout", "reward", "score", "backward")
PASSES = 3
"""Over the steps: rollout, log p, gradient."""


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
