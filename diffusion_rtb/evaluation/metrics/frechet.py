"""Fréchet distance: two sets of images as two Gaussians, in whatever space the embedder is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metrics._clouds import Cloud
from diffusion_rtb.evaluation.metrics._compared import Compared

__all__ = ["Frechet", "frechet_distance"]


class Frechet(Compared):
    """Distances of `frechet_distance`, and what sampling alone makes of it: `between_halves` of the re-weighted prior's samples.

    It errs high, by about as much as `between_halves` says, the more the fewer samples there are. `too_few` names the sides with no
    more (effective) samples than dimensions, whose covariance is singular; compare numbers of equally many samples only.
    It has no interval: a resampling errs high once more, so that a bootstrap's lies above the estimate (docs/evaluation.md).
    It is *the* FID where the embedder is `inception` and `eval.reference` holds real images.
    """

    name, columns = "frechet", ("Fréchet",)

    def between(self, clouds: Mapping[str, Cloud], pairs: Sequence[tuple[str, str]], config: EvalConfig) -> list[float]:
        """One each; NaN with a single sample."""
        moments = {name: _moments(cloud) for name, cloud in clouds.items()}
        return [_distance(moments[a], moments[b]) for a, b in pairs]

    def further(self, clouds: Mapping[str, Cloud]) -> dict[str, Any]:
        """`between_halves` and `too_few`."""
        cloud, few = clouds.get("reweighted_prior"), []
        for name, side in clouds.items():
            few += [name] if side.effective <= side.points.shape[1] else []
        if cloud is None or len(cloud.points) < 4:
            return {"between_halves": None, "too_few": few}
        halves = [_moments(cloud[torch.arange(start, len(cloud.points), 2)]) for start in (0, 1)]
        return {"between_halves": _distance(*halves), "too_few": few}

    def row(self, value: Any) -> tuple[str, ...]:
        """As of any other, with a mark where samples are too few."""
        return (f"{super().row(value)[0]}{' (few)' if value['too_few'] else ''}",)


def frechet_distance(
    one: Float[Tensor, "n dim"],
    other: Float[Tensor, "m dim"],
    weights: tuple[Float[Tensor, " n"] | None, Float[Tensor, " m"] | None] = (None, None),
) -> float:
    r"""|a - b|² + tr(A + B - 2·(A·B)^½) of the means a, b and covariances A, B of two sets of vectors, in float64; at least 0.

    With A = Rᵀ·R and B = Sᵀ·S the trace of (A·B)^½ is the sum of the singular values of R·Sᵀ. Covariances are sums of w over
    1 - sum w², so that without weights they are those over n - 1.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Dowson and Landau 1982

    Args:
        one, other: The vectors.
        weights: Of each; None: equal ones.

    Returns:
        The squared distance, as FID is; NaN where one side is a single vector.
    """
    sides = (Cloud.of(points, w) for points, w in zip((one, other), weights, strict=True))
    return _distance(*(_moments(side) for side in sides))


Moments = tuple[Tensor, Tensor]
"""Mean, and R with the covariance Rᵀ·R, of as few rows as there are."""


def _moments(cloud: Cloud) -> Moments:
    mean = cloud.weights @ cloud.points
    left = 1.0 - float(cloud.weights.square().sum())
    if left <= 1e-12:
        return mean, torch.full_like(cloud.points[:1], torch.nan)
    scaled = (cloud.points - mean) * (cloud.weights / left).sqrt()[:, None]
    return mean, torch.linalg.qr(scaled, mode="r").R if scaled.shape[0] > scaled.shape[1] else scaled


def _distance(one: Moments, other: Moments) -> float:
    (a, r), (b, s) = one, other
    if bool(r.isnan().any() | s.isnan().any()):
        return float("nan")
    shared = torch.linalg.svdvals(r @ s.T).sum()
    # Rounding may put the distance of a distribution to itself a hair below 0.
    return max(0.0, float((a - b).square().sum() + r.square().sum() + s.square().sum() - 2 * shared))
