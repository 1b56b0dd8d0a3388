"""beta as a function of the iteration."""

from __future__ import annotations

__all__ = ["annealed"]


def annealed(beta: float, iteration: int, *, start: float = 1.0, iterations: int = 0) -> float:
    """beta·(start + (1 - start)·min(1, iteration/iterations)): linear from a fraction of beta to beta; nats per reward."""
    if iterations <= 0:
        return beta
    return beta * (start + (1 - start) * min(1.0, iteration / iterations))
