"""How samples are spread over the modes of a target, and how far that is from the truth."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.comparison.exact import Modes
from diffusion_rtb.metrics import total_variation

__all__ = ["WITHIN", "mode_distance", "mode_shares"]

WITHIN = 4.0
"""Standard deviations from the nearest centre within which a sample counts for a mode; in 2-D 0.03 % of a mode are outside."""


def mode_shares(x: Float[Tensor, "batch dim"], modes: Modes) -> Float[Tensor, " modes_and_off"]:
    """Share of the samples that lie in each mode, and last the share that is "off", in none.

    Raises:
        ValueError: there are no samples, or they have another dimension than the modes.
    """
    if len(x) == 0 or x.shape[1] != modes.centres.shape[1]:
        raise ValueError(
            f"Samples of shape {tuple(x.shape)} cannot be counted into modes of {modes.centres.shape[1]} numbers each."
        )
    distance, index = torch.cdist(x.double().cpu(), modes.centres.double()).min(1)
    index = torch.where(distance <= WITHIN * modes.std, index, len(modes.centres))
    return torch.bincount(index, minlength=len(modes.centres) + 1).double() / len(x)


def mode_distance(shares: Float[Tensor, " modes_and_off"], modes: Modes) -> float:
    """Total variation between these shares and the true ones, which have nothing off; in [0, 1].

    Of n samples of the truth itself it is about sum_k sqrt(w_k / n) / 2.5, e.g. 0.01 for nine modes and n = 10,000.
    """
    if not math.isclose(float(modes.weights.sum()), 1.0, abs_tol=1e-5):
        raise ValueError(f"Weights of modes must sum to 1, got {modes.weights.tolist()}.")
    return total_variation(shares, torch.cat([modes.weights.double(), torch.zeros(1, dtype=torch.float64)]))
