"""Kernel Inception distance: maximum mean discrepancy under a polynomial kernel, in whatever space the embedder is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metrics._clouds import Cloud
from diffusion_rtb.evaluation.metrics._compared import Compared
from diffusion_rtb.evaluation.metrics._kernels import kernel_distances

__all__ = ["KID"]


class KID(Compared):
    r"""scale·MMD² with k(x, y) = (x·y / dim + 1)^degree on the features as they are, unbiased; 0 for equal distributions.

    Published KID is the mean over some random subsets of the estimate within each; this is the same over all subsets there are,
    which is the estimate of all samples at once. It is *the* KID where the embedder is `inception`.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401

    Args:
        degree: Of the polynomial.
        scale: Factor on MMD².
    """

    name, columns, key = "kid", ("KID",), "mean"

    def __init__(self, degree: int = 3, scale: float = 1.0) -> None:
        if degree < 1:
            raise ValueError(f"degree is {degree}: it must be at least 1.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}: it must be positive.")
        self.degree, self.scale = degree, scale

    def between(
        self, clouds: Mapping[str, Cloud], pairs: Sequence[tuple[str, str]], config: EvalConfig
    ) -> list[dict[str, float]]:
        """`mean`, `low` and `high` of each."""
        return kernel_distances(self._kernel, clouds, pairs, config, scale=self.scale, unit=False)

    def _kernel(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
        return (x @ y.T / x.shape[1] + 1) ** self.degree
