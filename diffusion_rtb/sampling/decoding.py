"""From the end of a trajectory to a picture, and whose fault it is where none comes out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Prior

__all__ = ["DecodingError", "decoded"]


class DecodingError(RuntimeError):
    """Samples or pictures that are not numbers; the message says which part of the prior made them."""


def decoded(prior: Prior, x_0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *shape"]:
    """`prior.decode(x_0)`, all of it finite: a reward would else be blamed for what the prior's decoder did.

    Raises:
        DecodingError: x_0 itself, or what became of it, is not finite.
    """
    bad = _first_bad(x_0)
    if bad is not None:
        raise DecodingError(
            f"x_0 of sample {bad} is not finite: the prior's network or its sampler made NaN or infinity. "
            "Use dtype: float32, a smaller train.lr, or other weights."
        )
    images = prior.decode(x_0)
    bad = _first_bad(images)
    if bad is not None:
        raise DecodingError(
            f"Sample {bad} is finite, x_0 from {float(x_0[bad].min()):.3g} to {float(x_0[bad].max()):.3g}, and its picture is not: "
            f"{type(prior).__name__}'s decoder (the VAE of a latent model) made NaN or infinity, before the reward saw it. Use "
            "dtype: float32, or a VAE whose weights are sound in this precision."
        )
    return images


def _first_bad(values: Tensor) -> int | None:
    """Which row has a number that is not finite."""
    if bool(torch.isfinite(values).all()):
        return None
    return int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
