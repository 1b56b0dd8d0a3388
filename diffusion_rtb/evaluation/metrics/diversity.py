r"""How different the pictures of one prompt are, in an embedding space (CLIP)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["Diversity", "mean_pairwise_cosine_distance", "vendi_score"]


class Diversity(Metric):
    """Pairwise cosine distance and Vendi score within a prompt, mean over prompts.

    All use equally many samples, because Vendi scores grow with their number. The weights of the re-weighted prior are uneven, so
    its Vendi score errs low: by how much, its ESS says.
    """

    name, needs, columns = "diversity", "embedding", ("distance", "Vendi")

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any] | None:
        """Of prior, posterior and re-weighted prior; None with single samples."""
        prompts = posterior.prompt.unique().tolist()
        count = min(int((d.prompt == row).sum()) for d in (prior, posterior) for row in prompts)
        if count < 2:
            return None
        before, after = prior.first(count), posterior.first(count)
        rows: dict[str, list[tuple[float, float]]] = {"prior": [], "posterior": [], "reweighted_prior": []}
        for row in prompts:
            one, other = before.of(row), after.of(row)
            weights = torch.softmax(beta * one.reward.double(), 0)
            for name, drawn, w in (
                ("prior", one, None),
                ("posterior", other, None),
                ("reweighted_prior", one, weights),
            ):
                assert drawn.embedding is not None
                e = drawn.embedding
                rows[name].append((mean_pairwise_cosine_distance(e, w), vendi_score(e, w)))
        return {
            name: {
                "pairwise_cosine_distance": sum(d for d, _ in found) / len(found),
                "vendi": sum(v for _, v in found) / len(found),
            }
            for name, found in rows.items()
        }

    def row(self, value: Any) -> tuple[str, ...]:
        """The prior's and what is left of it."""
        shown = (("pairwise_cosine_distance", 2), ("vendi", 1))
        return tuple(f"{value['prior'][key]:.{n}f} → {value['posterior'][key]:.{n}f}" for key, n in shown)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Both, of both sides."""
        labels = (("pairwise_cosine_distance", "pairwise cosine distance"), ("vendi", "Vendi score"))
        return {label: {side: value[side][key] for side in ("prior", "posterior")} for key, label in labels}


def mean_pairwise_cosine_distance(
    embeddings: Float[Tensor, "batch features"], weights: Float[Tensor, " batch"] | None = None
) -> float:
    r"""Mean of 1 − cos(e_i, e_j) over pairs i ≠ j, in [0, 2]; 0 when all pictures look alike to the embedding.

    With weights it is sum w_i·w_j·d_ij / sum w_i·w_j over i ≠ j: the distance within the re-weighted distribution.
    Its expectation does not depend on the number of pictures.

    Raises:
        ValueError: fewer than two embeddings, or one of them is zero or not finite.
    """
    e = _unit(embeddings)
    if len(e) < 2:
        raise ValueError(f"A pairwise distance needs at least 2 embeddings, got {len(e)}; raise eval.samples.")
    w = _distribution(weights, len(e)).to(e.device)
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
    e = _unit(embeddings)
    scaled = e * _distribution(weights, len(e)).to(e.device).sqrt()[:, None]
    # K/n and the covariance share their non-zero eigenvalues; take the smaller of the two.
    gram = scaled.T @ scaled if e.shape[1] < e.shape[0] else scaled @ scaled.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    eigenvalues = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(eigenvalues).sum().exp())


def _unit(embeddings: Tensor) -> Tensor:
    e = embeddings.detach().double()
    norm = e.norm(dim=1, keepdim=True)
    if len(e) == 0 or not bool((norm > 0).all() & norm.isfinite().all()):
        raise ValueError(
            f"Embeddings must be finite and non-zero, got {tuple(e.shape)} with norms {norm.flatten()[:8].tolist()}."
        )
    return e / norm


def _distribution(weights: Tensor | None, n: int) -> Tensor:
    if weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    if len(weights) != n or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise ValueError(
            f"Weights must be {n} non-negative numbers, not all zero, got {weights.tolist()[:8]} ({len(weights)})."
        )
    return weights.detach().double() / weights.double().sum()
