"""How alike vectors are by their angles: pure functions of small tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["distribution", "mean_pairwise_cosine_distance", "unit_vectors", "vendi_score"]


def mean_pairwise_cosine_distance(
    embeddings: Float[Tensor, "batch features"], weights: Float[Tensor, " batch"] | None = None
) -> float:
    r"""Mean of 1 − cos(e_i, e_j) over pairs i ≠ j, in [0, 2]; 0 when all pictures look alike to the embedding.

    With weights it is sum w_i·w_j·d_ij / sum w_i·w_j over i ≠ j: the distance within the re-weighted distribution.
    Its expectation does not depend on the number of pictures.

    Raises:
        ValueError: fewer than two embeddings, or one of them is zero or not finite.
    """
    e = unit_vectors(embeddings)
    if len(e) < 2:
        raise ValueError(f"A pairwise distance needs at least 2 embeddings, got {len(e)}; raise eval.samples.")
    w = distribution(weights, len(e)).to(e.device)
    pairs = 1.0 - float(w.square().sum())
    if pairs <= 0.0:
        return 0.0  # one picture holds all the weight
    similar = float((w @ e).square().sum() - w.square().sum())
    return max(0.0, 1.0 - similar / pairs)


def vendi_score(embeddings: Float[Tensor, "batch features"], weights: Float[Tensor, " batch"] | None = None) -> float:
    r"""Vendi score exp(−sum λ_i log λ_i), λ the eigenvalues of K/n with K_ij = cos(e_i, e_j); in [1, n].

    The effective number of different pictures: k groups of identical, mutually orthogonal pictures score k. It grows
    with n, so compare it only between equal n. With weights p (summing to 1), K/n becomes diag(√p)·K·diag(√p).

    Reference: Friedman and Dieng, "The Vendi Score", 2023, https://arxiv.org/abs/2210.02410

    Raises:
        ValueError: there are no embeddings, or one of them is zero or not finite.
    """
    e = unit_vectors(embeddings)
    scaled = e * distribution(weights, len(e)).to(e.device).sqrt()[:, None]
    # K/n and the covariance share their non-zero eigenvalues; take the smaller of the two.
    gram = scaled.T @ scaled if e.shape[1] < e.shape[0] else scaled @ scaled.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    eigenvalues = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(eigenvalues).sum().exp())


def distribution(weights: Tensor | None, n: int) -> Tensor:
    """n weights that sum to 1, float64; None: equal ones. ValueError: one is negative, or all are zero."""
    if weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    if len(weights) != n or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise ValueError(
            f"Weights must be {n} non-negative numbers, not all zero, got {weights.tolist()[:8]} ({len(weights)})."
        )
    return weights.detach().double() / weights.double().sum()


def unit_vectors(points: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """x / |x|, float64.

    Raises:
        ValueError: there are none, or one is zero or not finite.
    """
    points = points.detach().double()
    norm = points.norm(dim=1, keepdim=True)
    wrong = (~((norm > 0) & norm.isfinite())).flatten().nonzero().flatten().tolist()
    if len(points) == 0 or wrong:
        where = f"; wrong are rows {wrong[:8]}" if wrong else ""
        raise ValueError(
            f"Embeddings must be finite and non-zero, or they point nowhere; got {tuple(points.shape)} with norms "
            f"{norm.flatten()[:8].tolist()}{where}."
        )
    return points / norm
