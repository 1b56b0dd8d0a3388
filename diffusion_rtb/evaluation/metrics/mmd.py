"""Maximum mean discrepancy: how far apart two sets of images are, without a model of either."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metrics._clouds import Cloud, distances
from diffusion_rtb.evaluation.metrics._compared import Compared
from diffusion_rtb.evaluation.metrics._kernels import kernel_distances

__all__ = ["MMD"]


class MMD(Compared):
    r"""scale·MMD² = scale·(E k(x, x') + E k(y, y') - 2·E k(x, y)) with k(x, y) = exp(-|x - y|² / (2·sigma²)), unbiased.

    0 where both sides are the same distribution; sampling noise goes below it. With the defaults and a CLIP as embedder it is CMMD
    but for the bias: the published code counts each image with itself. Unit vectors are at most 2 apart, where a sigma of 10
    sees little but the distance of the means.

    Source: Jayasumana et al. 2024, "Rethinking FID", https://arxiv.org/abs/2401.09603; Gretton et al. 2012, lemma 6,
    https://jmlr.org/papers/v13/gretton12a.html

    Args:
        sigma: Width of the kernel, in units of the features.
        scale: Factor on MMD².
        normalise: Whether features are scaled to length 1.
    """

    name, columns, key = "mmd", ("MMD",), "mean"

    def __init__(self, sigma: float = 10.0, scale: float = 1000.0, *, normalise: bool = True) -> None:
        for what, value in (("sigma", sigma), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{what} is {value}: it must be positive.")
        self.sigma, self.scale, self.normalise = sigma, scale, normalise

    def between(
        self, clouds: Mapping[str, Cloud], pairs: Sequence[tuple[str, str]], config: EvalConfig
    ) -> list[dict[str, float]]:
        """`mean`, `low` and `high` of each."""
        return kernel_distances(self._kernel, clouds, pairs, config, scale=self.scale, unit=self.normalise)

    def _kernel(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
        # Without the constant 1, which cancels: what is left is small, and so is its rounding.
        return torch.expm1(-distances(x, y).square() / (2 * self.sigma**2))
