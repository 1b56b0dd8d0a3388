"""What every objective asks of its input before it computes anything."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Terms

__all__ = ["check_beta", "check_terms"]

REMEDY = {
    "log_q": "Check the standard deviation of that step, lower the learning rate, or score in float32.",
    "log_p": "Check the standard deviation of that step, or score in float32.",
    "reward": "Fix the reward for that image; it is never replaced by a number.",
}


def check_beta(beta: float) -> None:
    """Refuse an inverse temperature that defines no posterior.

    Raises:
        ValueError: beta is not a positive finite number.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(
            f"beta must be a positive finite number of nats per unit of reward, got {beta}. A beta near 0 stays at the "
            "prior; to push a reward down, negate the reward."
        )


def check_terms(terms: Terms, beta: float) -> None:
    """Refuse terms that would make a silent wrong loss: shapes that broadcast, values that are not finite.

    Raises:
        ValueError: beta is not positive, a shape does not fit, or a value is NaN or infinite; the message names the
            trajectory.
    """
    check_beta(beta)
    if terms.log_q.ndim != 2:
        raise ValueError(f"log_q must have the shape (batch, steps), got {tuple(terms.log_q.shape)}.")
    batch, steps = terms.log_q.shape
    expected = {"log_p": (batch, steps), "reward": (batch,), "prompt": (batch,)}
    for name, shape in expected.items():
        found = tuple(getattr(terms, name).shape)
        if found != shape:
            raise ValueError(
                f"{name} has the shape {found}, but log_q is {(batch, steps)}: {name} must be {shape}, it is not broadcast."
            )
    if batch == 0 or steps == 0:
        raise ValueError(f"An objective needs at least one trajectory of one step, got log_q of {(batch, steps)}.")
    for name in REMEDY:
        check_finite(name, getattr(terms, name))


def check_finite(name: str, values: Float[Tensor, "batch *steps"]) -> None:
    """Refuse values that are NaN or infinite.

    Raises:
        ValueError: names the first offending trajectory, and the step where there is one.
    """
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    rows = (~finite).reshape(len(values), -1).any(dim=1)
    first = (~finite).nonzero()[0].tolist()
    step = f", step {first[1]}," if len(first) > 1 else ""
    raise ValueError(
        f"{name} of trajectory {first[0]}{step} is {values[tuple(first)].item()} "
        f"({int(rows.sum())} of {len(values)} trajectories are not finite). {REMEDY[name]}"
    )
