"""Parameters of densities as a config has them, checked, with one meaning for priors and for rewards; float64.

Every function raises a ValueError where they are not what it says.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Numbers", "matrix", "normalised", "numbers", "point", "symmetric"]

Numbers = Any
"""Integers among floats, in lists; checked here, with better words than an annotation's."""

TOLERANCE = 1e-4
"""By how much weights written with a few digits may miss a sum of 1."""

KINDS = ("a number", "a list of at least one number", "a list of lists of numbers such as [[-5, 0], [5, 0]]")


def numbers(name: str, given: Numbers, *ndims: int) -> Float[Tensor, "..."]:
    """Finite numbers, in a tensor of one of these numbers of dimensions; of any, where none is given."""
    try:
        found = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {given!r}: it must be numbers in lists of equal length ({error}).") from None
    if ndims and (found.ndim not in ndims or found.numel() == 0):
        kinds = " or ".join(KINDS[ndim] for ndim in ndims)
        raise ValueError(f"{name} has the shape {tuple(found.shape)}: it must be {kinds}.")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} is {given!r}: every number must be finite.")
    return found


def point(name: str, given: Numbers, dim: int | None = None) -> Float[Tensor, " dim"]:
    """At least one number, or `dim` numbers."""
    found = numbers(name, given, 1)
    if dim is not None and len(found) != dim:
        raise ValueError(f"{name} has the shape {tuple(found.shape)}: give {dim} numbers.")
    return found


def symmetric(name: str, given: Numbers, dim: int) -> Float[Tensor, "..."]:
    """A symmetric matrix (dim, dim), or the diagonal (dim,) of one, from either of them or one number."""
    found = numbers(name, given)
    if found.ndim == 0:
        return found.expand(dim)
    if found.shape not in ((dim,), (dim, dim)):
        raise ValueError(
            f"{name} has the shape {tuple(found.shape)}: give a {dim} x {dim} matrix, its diagonal, or one number."
        )
    if found.ndim == 2 and not torch.allclose(found, found.T, rtol=1e-6, atol=0):
        raise ValueError(f"{name} is not symmetric: {found.tolist()}.")
    return found if found.ndim == 1 else (found + found.T) / 2


def matrix(name: str, given: Numbers, dim: int) -> Float[Tensor, "dim dim"]:
    """As `symmetric`, the matrix in any case."""
    found = symmetric(name, given, dim)
    return torch.diag(found) if found.ndim == 1 else found


def normalised(weights: Numbers, count: int, *, zero: bool) -> Float[Tensor, " count"]:
    """Weights of `count` means, divided by their sum, which must be 1 but for rounding.

    Args:
        weights: One per mean; None: all equal.
        count: Of means.
        zero: Whether a weight may be 0.
    """
    w = numbers("weights", [1 / count] * count if weights is None else weights, 1)
    if len(w) != count:
        raise ValueError(f"There are {count} means and {len(w)} weights: give one weight per mean.")
    if not bool((w >= 0).all() if zero else (w > 0).all()):
        allowed = "must not be negative" if zero else "must be positive; leave out a component without weight"
        raise ValueError(f"weights are {w.tolist()}: every weight {allowed}.")
    total = float(w.sum())
    if abs(total - 1) > TOLERANCE:
        right = f"; divided by it they are [{', '.join(f'{v:.6f}' for v in (w / total).tolist())}]" if total > 0 else ""
        raise ValueError(f"weights sum to {total:.6g} instead of 1{right}.")
    return w / total
