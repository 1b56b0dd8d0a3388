"""What every objective asks of its input before it computes anything."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.not_finite import NotFiniteError

__all__ = ["check_beta", "check_choice", "check_clip_range", "check_policy_terms", "check_positive", "check_terms"]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value itself where it is allowed; ValueError where not."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def check_clip_range(clip_range: float) -> float:
    """The clip range itself where it is between 0 and 1; ValueError where not."""
    if not 0 < clip_range < 1:
        raise ValueError(
            f"clip_range must be between 0 and 1, got {clip_range}: ratios are kept within 1 - clip_range and 1 + clip_range. "
            "Log-densities are sums over dimensions here; a range meant for their mean is multiplied by their number."
        )
    return clip_range


def check_policy_terms(terms: Terms, beta: float, *, uses_kl: bool = False) -> None:
    """`check_terms`, and the same for the behaviour's densities and the closed-form KL where they are read; ValueError."""
    check_terms(terms, beta)
    if uses_kl and terms.kl is None:
        raise ValueError(
            "This objective needs the closed-form KL of each transition (Terms.kl), which the trainer computes for objectives "
            "with `uses_kl`; it is None."
        )
    optional = {"log_behaviour": terms.log_behaviour} | ({"kl": terms.kl} if uses_kl else {})
    for name, values in optional.items():
        if values is not None:
            check_form(name, values, tuple(terms.log_q.shape), terms)
            check_finite(name, values)


def check_positive(name: str, value: float) -> float:
    """The value itself where it is a positive finite number; ValueError where not."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value}.")
    return value


REMEDIES = {
    "log_q": "Check the standard deviation of that step, lower the learning rate, or score in float32.",
    "reward": "Fix the reward for that image; it is never replaced by a number.",
}
REMEDY = "Check the standard deviation of that step, or score in float32."


def check_beta(beta: float) -> None:
    """Refuse an inverse temperature that defines no posterior; ValueError."""
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
    for name, shape in {"log_p": (batch, steps), "reward": (batch,), "prompt": (batch,)}.items():
        check_form(name, getattr(terms, name), shape, terms)
    if batch == 0 or steps == 0:
        raise ValueError(f"An objective needs at least one trajectory of one step, got log_q of {(batch, steps)}.")
    for name in ("log_q", "log_p", "reward"):
        check_finite(name, getattr(terms, name))


def check_form(name: str, values: Tensor, shape: tuple[int, ...], terms: Terms) -> None:
    """Refuse another shape, which would broadcast; ValueError."""
    if values.shape != shape:
        raise ValueError(
            f"{name} has the shape {tuple(values.shape)}, but log_q is {tuple(terms.log_q.shape)}: {name} must be {shape}, it is "
            "not broadcast."
        )


def check_finite(name: str, values: Float[Tensor, "batch *steps"]) -> None:
    """Refuse values that are NaN or infinite; the NotFiniteError names the first trajectory, and the step where there is one."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    rows = (~finite).reshape(len(values), -1).any(dim=1)
    first = (~finite).nonzero()[0].tolist()
    step = f", step {first[1]}," if len(first) > 1 else ""
    raise NotFiniteError(
        f"{name} of trajectory {first[0]}{step} is {values[tuple(first)].item()} "
        f"({int(rows.sum())} of {len(values)} trajectories are not finite). {REMEDIES.get(name, REMEDY)}"
    )
