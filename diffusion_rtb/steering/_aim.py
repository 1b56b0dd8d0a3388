"""What is steered towards, and what is known of a state on the way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxtyping import Float
from torch import Tensor

__all__ = ["Aim", "Kind", "State"]

Kind = Literal["reward", "learned", "both"]
"""Of value: r(x0_hat), a learned V, or both."""


@dataclass(frozen=True, eq=False)
class State:
    """The states of one step, before it is made, as a value sees them."""

    x_t: Float[Tensor, "rows *dims"]
    timestep: float
    step: int
    """Its place in the chain."""
    signal: float
    """a²/(a² + b²) of x_t = a·x_0 + b·noise: 0 where nothing is left of x_0, 1 at the end."""
    estimate: Callable[[], Tensor]
    """Makes `x_0`."""

    @cached_property
    def x_0(self) -> Float[Tensor, "rows *dims"]:
        """x0_hat, Tweedie's estimate of the end; ValueError: it does not follow from what the network predicts."""
        return self.estimate()


@dataclass(frozen=True, eq=False)
class Aim:
    r"""p(x)·exp(beta·r(x)) / Z, and the value of a state x_t, what its continuations promise, in reward units.

    The best value is V(x_t) = 1/beta · log E_p[exp(beta·r(x_0)) | x_t]; any other makes more variance, and nothing wrong where
    weights are kept (`smc`).
    """

    reward: Callable[[Tensor], Tensor]
    """r of states x_0, (rows, *dims) -> (rows,), finite; the rows are those of the pipeline's call."""
    beta: float
    """Nats per unit of reward."""
    value: Callable[[State], Tensor] | None = None
    """(rows,), in reward units; None: r(x0_hat)."""

    def at(self, state: State) -> Float[Tensor, " rows"]:
        """beta·V of each row, nats, float64, on the host."""
        return self.beta * _finite(self.reward(state.x_0) if self.value is None else self.value(state))

    def end(self, x_0: Float[Tensor, "rows *dims"]) -> Float[Tensor, " rows"]:
        """r of each row, reward units, float64, on the host."""
        return _finite(self.reward(x_0))


def _finite(values: Tensor) -> Float[Tensor, " rows"]:
    found = values.detach().double().cpu()
    if not bool(found.isfinite().all()):
        raise ValueError(f"A value to steer by is not finite: {found.tolist()[:8]}. Bound the reward, or V.")
    return found
