"""Log-densities by their parameters: Gaussian mixtures, Gaussians, and quadratic or linear forms; float64 inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.densities import Numbers, normalised, numbers, point, symmetric

__all__ = ["LogDensity", "gaussian", "log_density", "mixture", "quadratic"]

LogDensity = Callable[[Tensor], Tensor]
"""x (batch, dim), float64 -> (batch,) nats."""


def log_density(given: str | Mapping[str, Any]) -> LogDensity:
    """The log-density that an argument of `density` stands for.

    Args:
        given: `module:attribute` of a callable x -> (batch,), or of an object with `log_prob`; or the arguments of
            `mixture` (known by `means`), `gaussian` (by `covariance`) or `quadratic`.

    Raises:
        ValueError: the name leads nowhere, or arguments are unknown, missing or impossible.
    """
    if isinstance(given, str):
        return _named(given)
    make: Callable[..., LogDensity]
    make = mixture if "means" in given else gaussian if "covariance" in given else quadratic
    needed, known = _KEYS[make]
    surplus, lacking = sorted(given.keys() - known), sorted(needed - given.keys())
    if surplus or lacking or not given:
        forms = "; ".join(f"{{{', '.join(sorted(keys))}}}" for _, keys in _KEYS.values())
        wrong = f"has no {surplus[0]!r}" if surplus else f"lacks {lacking[0]!r}" if lacking else "is empty"
        raise ValueError(f"The density {dict(given)} {wrong}. It is 'module:function' or one of {forms}.")
    return make(**given)


def mixture(means: Numbers, variance: Numbers, weights: Numbers = None) -> LogDensity:
    r"""log sum_k w_k N(x; m_k, v_k I).

    Args:
        means: m, one point per component.
        variance: v, one for all or one per component; positive.
        weights: w; positive, sum 1. None: all equal.
    """
    m = numbers("means", means, 2)
    count, dim = m.shape
    v = numbers("variance", variance, 0, 1).expand(count)
    if not (v > 0).all():
        raise ValueError(f"variance is {variance}: every variance must be positive.")
    offset = normalised(weights, count, zero=False).log() - dim / 2 * (2 * math.pi * v).log()

    def log_prob(x: Tensor) -> Tensor:
        squares = (_points(x, dim)[:, None] - m.to(x.device)).square().sum(2)
        return (offset.to(x.device) - squares / (2 * v.to(x.device))).logsumexp(1)

    return log_prob


def gaussian(mean: Numbers, covariance: Numbers) -> LogDensity:
    r"""log N(x; mean, C).

    Args:
        mean: A point.
        covariance: C: a matrix, its diagonal, or one variance for all; positive definite.
    """
    m = point("mean", mean)
    C = symmetric("covariance", covariance, len(m))
    eigenvalues = C if C.ndim == 1 else torch.linalg.eigvalsh(C)
    if eigenvalues.min() <= 0:
        raise ValueError(f"covariance has the eigenvalue {eigenvalues.min():.4g}: it must be positive definite.")
    constant = -len(m) / 2 * math.log(2 * math.pi) - float(eigenvalues.log().sum()) / 2
    precision = 1 / C if C.ndim == 1 else torch.cholesky_inverse(torch.linalg.cholesky(C))

    def log_prob(x: Tensor) -> Tensor:
        return constant - _form(precision.to(x.device), _points(x, len(m)) - m.to(x.device)) / 2

    return log_prob


def quadratic(
    mean: Numbers = None, precision: Numbers = None, linear: Numbers = None, constant: Numbers = 0.0
) -> LogDensity:
    r"""constant + a·x − (x − mean)ᵀ P (x − mean) / 2: a log-density up to its normaliser, whatever that is.

    Args:
        mean: Where the quadratic part is highest; the origin by default.
        precision: P: a matrix, its diagonal, or one number for all; positive semi-definite. None: no quadratic part.
        linear: a; None: no linear part.
        constant: In nats.
    """
    if linear is None and (mean is None or precision is None):
        raise ValueError("A quadratic density needs `linear`, or both `mean` and `precision`.")
    points = {name: point(name, given) for name, given in (("mean", mean), ("linear", linear)) if given is not None}
    dims = {name: len(point) for name, point in points.items()}
    if len(set(dims.values())) > 1:
        raise ValueError(
            f"mean has {dims['mean']} numbers and linear {dims['linear']}: both are points of the same space."
        )
    (dim,) = set(dims.values())
    m, a = (points.get(name, torch.zeros(dim, dtype=torch.float64)) for name in ("mean", "linear"))
    P = symmetric("precision", 0.0 if precision is None else precision, dim)
    smallest = float(P.min() if P.ndim == 1 else torch.linalg.eigvalsh(P)[0])
    if smallest < -1e-9 * float(P.abs().max()):
        raise ValueError(f"precision has the eigenvalue {smallest:.4g}: it must be positive semi-definite.")
    c = float(numbers("constant", constant, 0))

    def log_prob(x: Tensor) -> Tensor:
        apart = _points(x, dim) - m.to(x.device)
        return c + x @ a.to(x.device) - _form(P.to(x.device), apart) / 2

    return log_prob


_KEYS: Mapping[Any, tuple[set[str], set[str]]] = {
    mixture: ({"means", "variance"}, {"means", "variance", "weights"}),
    gaussian: ({"mean", "covariance"}, {"mean", "covariance"}),
    quadratic: (set(), {"mean", "precision", "linear", "constant"}),
}


def _named(path: str) -> LogDensity:
    from diffusion_rtb.config.components import locate

    found = locate(path)
    method = getattr(found, "log_prob", None)
    if callable(method):
        return method
    if not callable(found):
        raise ValueError(f"{path} is of type {type(found).__name__}: name a function of x, or an object with log_prob.")
    return found


def _points(x: Tensor, dim: int) -> Tensor:
    if x.shape[1] != dim:
        raise ValueError(f"The density is over {dim} numbers, each sample has {x.shape[1]}.")
    return x


def _form(matrix: Float[Tensor, "..."], x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
    """xᵀ M x for each row, M a matrix or its diagonal."""
    return ((x * matrix if matrix.ndim == 1 else x @ matrix) * x).sum(1)
