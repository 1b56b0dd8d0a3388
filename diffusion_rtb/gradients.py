"""Gradients on their way to the network: weighed by step, and only if they belong to the chain that was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["check_parity", "step_weights"]


def step_weights(given: Sequence[float] | None, cotangent: Float[Tensor, "batch steps"]) -> Float[Tensor, " steps"]:
    """A preconditioner: steps that decide little of the reward but have large gradients can be kept from drowning the rest.

    Raises:
        ValueError: there is not one weight per step.
    """
    steps = cotangent.shape[1]
    weights = given or (1.0,) * steps
    if len(weights) != steps:
        raise ValueError(
            f"train.step_weights has {len(weights)} entries, the chain has {steps} steps: give one for each, or null."
        )
    return torch.tensor(weights, dtype=cotangent.dtype, device=cotangent.device)


def check_parity(parity: float, tolerance: float, iteration: int) -> None:
    """Refuse a gradient that was taken along another chain than the recorded one.

    Args:
        parity: max |recorded - replayed| log_q; nats.
        tolerance: `train.parity_tolerance`; nats.
        iteration: For the message.

    Raises:
        ValueError: it is above the tolerance.
    """
    if parity > tolerance:
        raise ValueError(
            f"parity is {parity:.3g} nats at iteration {iteration}, above train.parity_tolerance={tolerance:g}: the "
            "replayed log-densities are not those of the rollout, so gradients would belong to another chain. Look for "
            "dropout, autocast or a reward that changes the pipeline; half-precision networks need a larger tolerance."
        )
