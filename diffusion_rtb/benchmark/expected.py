"""How long a part is going to take, from what one network call of the same model took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_rtb.benchmark.plan import DTYPES, Part

__all__ = ["expected_seconds"]

UNKNOWN = 15.0
"""Seconds of a part of which nothing is known."""

SAMPLINGS, ITERATIONS, UPDATES, FLOORS, CALLS = 6, 3, 5, 3, 6
"""Runs of the chain that a part makes at least: warm-ups, those that count waits, and timed ones."""


def expected_seconds(part: Part, results: Mapping[str, Mapping[str, Any]], *, loaded: bool) -> float:
    """Seconds, without the time that a measurement takes of its own accord to be repeated.

    Args:
        part: The part.
        results: What has been measured, by part.
        loaded: Whether its prior is loaded already.
    """
    call = _call(part, results)
    if part.measure == "rate":
        return 2.0
    extra = part.row.compile if part.measure == "compiled" and part.row else 0.0
    if call is None:
        return UNKNOWN + extra
    forward, both, load = call
    forward, both = forward * part.batch, both * part.batch
    chains = {
        "network": CALLS * (forward + both) / max(part.steps, 1),
        "sampling": SAMPLINGS * forward,
        "floor": FLOORS * forward,
        "iteration": ITERATIONS * max(2 // part.batch, 1) * (2 * forward + both),
        "update": UPDATES * (forward + both),
        "compiled": 3 * forward,
    }
    return part.steps * chains[part.measure] + extra + (0.0 if loaded else load)


def _call(part: Part, results: Mapping[str, Mapping[str, Any]]) -> tuple[float, float, float] | None:
    """Seconds of a network call per sample, of one with its gradient, and of loading; of the same dtype, or of any other."""
    for dtype in dict.fromkeys((part.dtype, *DTYPES)):
        of_model = [
            (int(found["batch"]), found)
            for name, found in results.items()
            if name.startswith(f"{part.model}-{dtype}-network-") and "seconds_with_gradient" in found
        ]
        if of_model:
            batch, found = min(of_model, key=lambda it: abs(it[0] - part.batch))
            return found["seconds"] / batch, found["seconds_with_gradient"] / batch, found["load_seconds"]
    return None
