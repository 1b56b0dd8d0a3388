"""The noise predictor of a Gaussian prior, in closed form, with an affine correction per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from pipelines._analytic.pipeline import VectorDenoiser

__all__ = ["AffineCorrection", "GaussianDenoiser"]


class AffineCorrection(nn.Module):
    """u(x_t, t) = slope_t x_t + offset_t with its own numbers at each step; 0 at the start.

    The posterior of a Gaussian chain and a quadratic reward has transitions of this kind: nothing is left to approximate.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(steps, dim, dim))
        self.offset = nn.Parameter(torch.zeros(steps, dim))

    def forward(self, x_t: Float[Tensor, "batch dim"], timestep: Any) -> Float[Tensor, "batch dim"]:
        """u, in standard deviations of the step; timesteps are 1 … T."""
        return torch.addmm(self.offset[timestep - 1], x_t, self.slope[timestep - 1].T)


class GaussianDenoiser(VectorDenoiser):
    """E[noise | x_t] = sqrt(1 - alpha_bar)·(alpha_bar·C + (1 - alpha_bar)·I)^-1 x_t for standardised data of covariance C.

    Args:
        mean: Of the data.
        covariance: Of the data, positive definite.
        steps: T.
        corrected: With the posterior's correction.
    """

    axes: Tensor
    variances: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, mean: Sequence[float], covariance: Sequence[Sequence[float]], steps: int, corrected: bool = False
    ) -> None:
        super().__init__()
        variances, axes = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
        scale, shift = variances.mean().sqrt(), torch.tensor(mean, dtype=torch.float64)
        self.prepare(steps, shift=shift, scale=scale, axes=axes, variances=variances / scale**2)
        if corrected:
            self.add_correction()

    def add_correction(self) -> None:
        """Attach the trainable part; the denoiser predicts the same as before."""
        self.correction = AffineCorrection(self.dim, len(self.gain) - 1)
        self.register_to_config(corrected=True)

    def noise(self, x_t: Float[Tensor, "batch dim"], alpha_bar: Float[Tensor, ""]) -> Float[Tensor, "batch dim"]:
        """In the eigenvectors of C, where every number has its own variance."""
        factor = (1 - alpha_bar).sqrt() / (alpha_bar * self.variances + (1 - alpha_bar))
        return ((x_t @ self.axes) * factor) @ self.axes.T
