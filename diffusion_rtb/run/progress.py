"""How far a run has come: what cards, metrics and terminals say of it, instead of what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_rtb.beta import make_beta
from diffusion_rtb.config.load import RunConfig

__all__ = ["Progress", "trained_beta"]


@dataclass(frozen=True)
class Progress:
    """What a posterior has been trained to."""

    done: int
    """Iterations."""
    asked: int
    """Iterations of the config."""
    beta: float
    """Of the posterior; nats per unit of reward."""
    checkpoint: str | None = None
    """Name of the checkpoint it was read from; None: it was not."""
    passed_over: tuple[str, ...] = ()
    """Names of newer checkpoints, which are damaged."""
    chosen: str = ""
    """Why it was this checkpoint and not the latest one; empty: it was the latest."""
    ema: float | None = None
    """Decay of the moving average of the posterior's numbers that it is; None: they are as they were trained last."""

    @property
    def iterations(self) -> str:
        """For tables: 100, or 7 of 100 (unfinished)."""
        if self.done >= self.asked:
            return f"{self.done}"
        return f"{self.done} of {self.asked} ({f'this checkpoint is {self.chosen}' if self.chosen else 'unfinished'})"

    @property
    def sentence(self) -> str:
        """For people."""
        why = f" ({self.chosen})" if self.chosen else ""
        source = f"Checkpoint {self.checkpoint}{why}: " if self.checkpoint else ""
        lost = f" Newer and damaged, so passed over: {', '.join(self.passed_over)}." if self.passed_over else ""
        whole = "" if self.done >= self.asked or self.chosen else " - the run is unfinished"
        average = f"; {self.average} of the posterior" if self.average else ""
        return f"{source}{self.done} of {self.asked} iterations{whole}; beta = {self.beta:.6g}{average}.{lost}"

    @property
    def average(self) -> str:
        """The moving average in words; empty where there is none."""
        return "" if self.ema is None else f"moving average (train.ema {self.ema:g})"

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "iterations_done": self.done,
            "iterations_asked": self.asked,
            "beta": self.beta,
            "checkpoint": self.checkpoint,
            "damaged_checkpoints_passed_over": list(self.passed_over),
        } | ({} if self.ema is None else {"ema": self.ema})


def trained_beta(config: RunConfig, state: Mapping[str, Any]) -> float:
    """The beta that a checkpoint's posterior stands for; nats per unit of reward.

    The config's; where that is annealed, of the last iteration done; under a `kl_budget` where it had moved it last. The state
    says how many iterations are done, and the beta of the next one.
    """
    beta = make_beta(config.beta)
    beta.load(float(state["beta"]))
    return beta.trained(int(state["iteration"]))
