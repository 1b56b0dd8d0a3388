"""Densities and divergences of isotropic normals, in nats, summed over dimensions; the size of numbers."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gaussian_kl", "normal_log_prob", "output_norm", "power_of_two", "precise"]


def power_of_two(largest: float) -> float:
    """The power of two in (largest / 2, largest]; 1 where there is none, because `largest` is 0 or not finite."""
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)


def precise(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def normal_log_prob(
    x: Float[Tensor, "batch *dims"], mean: Float[Tensor, "batch *dims"], std: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " batch"]:
    r"""log N(x; mean, std²·I) = -|x - mean|² / (2·std²) - D·log(std·sqrt(2π)), summed over the D dimensions, in nats.

    The squared errors are fp32 or better; `dtype` is that of their sum. At D = 16,384 the two terms are near 1e4 nats each,
    where fp32 resolves 1e-3: differences of log-densities are taken in float64 for that reason.
    """
    z = (precise(x) - mean) / std
    constant = z[0].numel() * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return -0.5 * z.square().flatten(1).sum(1, dtype=dtype) - constant


def gaussian_kl(
    mean_q: Float[Tensor, "batch *dims"], mean_p: Float[Tensor, "batch *dims"], std: float, dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """KL(q || p) = |mean_q - mean_p|² / (2·std²) of two transitions with the same deviation, summed over dims, in nats."""
    return 0.5 * ((precise(mean_q) - mean_p) / std).square().flatten(1).sum(1, dtype=dtype)


def output_norm(output: Float[Tensor, "batch *dims"], dtype: torch.dtype = torch.float32) -> Float[Tensor, " batch"]:
    """|e|, the Euclidean norm over dims of what the scheduler is given: predicted noise, velocity or x_0, guided; no gradient."""
    wide = torch.promote_types(output.dtype, dtype)
    norm: Tensor = torch.linalg.vector_norm(output.detach(), dim=tuple(range(1, output.ndim)), dtype=wide)
    return norm.to(dtype)
