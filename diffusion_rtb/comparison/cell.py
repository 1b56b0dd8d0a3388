"""One sampler of a comparison: trained if it has to be, measured, and never twice."""

from __future__ import annotations

from diffusion_rtb.comparison.clock import Clock
from diffusion_rtb.comparison.cost import Budget, Meter
from diffusion_rtb.comparison.files import held, write
from diffusion_rtb.comparison.truths.truth import Looks, Result, Truth
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.run.folder import run_folder
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer

__all__ = ["DivergedError", "finished", "timed", "train_and_measure"]


def finished(config: RunConfig, budget: Budget | None = None) -> Result | None:
    """The result of a run that was trained to its last iteration or to the end of its budget, and measured; or None."""
    found = held(run_folder(config))
    if found is None:
        return None
    spent = budget is not None and found.numbers.get(budget.cost, 0.0) >= budget.amount
    return found if spent or found.numbers.get("iterations") == config.train.iterations else None


class DivergedError(NotFiniteError):
    """A training went where there are no numbers any more; the message is that of the number."""


def train_and_measure(config: RunConfig, truth: Truth, looks: Looks, budget: Budget | None = None) -> Result | None:
    """Train a run to its end, from wherever it was left, and measure it; None where a signal ended it before.

    Raises:
        DivergedError: after its first iteration.
        ValueError: see `assemble`.
    """
    trainer, clock = timed(config, truth, looks, budget)
    try:
        trainer.fit()
    except NotFiniteError as error:
        if trainer.iteration == 0:  # whatever it is, training did not do it
            raise
        raise DivergedError(f"diverged in iteration {trainer.iteration + 1}: {error}") from error
    if trainer.interrupted and not clock.stop:
        return None
    with trainer.final():
        numbers, x = truth.measured(trainer.sampler, config, looks.samples)
    write(trainer.folder, numbers | {"iterations": trainer.iteration} | clock.costs, x)
    return finished(config, budget)


def timed(config: RunConfig, truth: Truth, looks: Looks, budget: Budget | None = None) -> tuple[Trainer, Clock]:
    """The trainer of a run, and the clock that it tells how it goes; see `Clock`."""
    trainer = assemble(config)
    clock = Clock(trainer, truth, Meter(trainer.sampler), looks, budget)
    trainer.observers.insert(0, clock)
    return trainer, clock
