"""A log-density, or the difference of two, as a reward: the pipelines whose samples are vectors have exact answers for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.exact import LogRatio
from rewards._densities import log_density

__all__ = ["Density"]


class Density(TwoPhase):
    r"""r(x) = log f(x) − log g(x), nats, on samples x (batch, dim); other shapes are flattened. Differentiable.

    With f the posterior and g the prior, normalised, p(x)·exp(r(x)) is the posterior and log Z = 0 at beta = 1.

    Both are written in one of these ways, and computed in float64:

        {means: [[0, 0], [1, 2]], variance: 0.3, weights: [0.5, 0.5]}     Gaussian mixture; `weights` equal by default
        {mean: [0, 0], covariance: [[1, 0.5], [0.5, 2]]}                  Gaussian; a matrix, its diagonal, or one number
        {mean: [0, 0], precision: 2.0, linear: [1, 0], constant: 0.0}     constant + a·x − (x − mean)ᵀ P (x − mean) / 2
        my_module:log_f                                                   a function x -> (batch,), or an object with log_prob

    Args:
        density: log f.
        minus: log g; None: 0.
    """

    def __init__(self, density: str | Mapping[str, Any], *, minus: str | Mapping[str, Any] | None = None) -> None:
        self.given = density, minus
        self.density = log_density(density)
        self.minus = None if minus is None else log_density(minus)

    @property
    def no_gradient(self) -> str | None:
        """It has one; of a function given by name only its author knows."""
        return None if any(isinstance(given, str) for given in self.given) else ""

    def log_ratio(self) -> LogRatio | None:
        """The parameters of f and g; None where one of them is a function."""
        density, minus = self.given
        return None if isinstance(density, str) or isinstance(minus, str) else LogRatio(density, minus)

    def __call__(self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        x = images.flatten(1).double()
        values = self.density(x) if self.minus is None else self.density(x) - self.minus(x)
        return values.to(torch.promote_types(images.dtype, torch.float32))
