"""What is said of a set of pictures of one class: E[log r], Fréchet distance to real ones, diversity, strength and KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_rtb.estimates import achieved_strength
from diffusion_rtb.evaluation.metrics.frechet import frechet_distance
from rewards.classifier import Classifier
from rewards.embedders.features import Features

__all__ = ["Judge", "diversity"]

Numbers = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges by one classifier: log r is its log p(class | x), the features are what goes into its last layer."""

    reward: Classifier
    features: Features
    real: Float[Tensor, "real dim"]
    """Features of real pictures of the class."""

    @torch.no_grad()
    def of(self, images: Float[Tensor, "batch 3 32 32"], weights: Float[Tensor, " batch"] | None = None) -> Numbers:
        """E[log r] with its standard error, Fréchet distance to the real pictures, diversity; of weighted pictures also the ESS."""
        log_r, vectors = self.reward(images, [""] * len(images)).double(), self.features.embed(images)
        share = torch.full_like(log_r, 1 / len(log_r)) if weights is None else weights.double() / weights.sum()
        mean = share @ log_r
        found: Numbers = {
            "log_r": float(mean),
            "log_r_error": float((share.square() @ (log_r - mean).square()).sqrt()),
            "frechet": frechet_distance(vectors, self.real, (weights, None)),
            "diversity": diversity(vectors, share),
            "n": float(len(log_r)),
        }
        return found if weights is None else found | {"ess": float(1 / share.square().sum())}

    def moved(self, log_q: Tensor, log_p: Tensor, log_r: Float[Tensor, " batch"], beta: float) -> Numbers:
        """Achieved strength, r² and KL of trajectories."""
        ratio = (log_q.double() - log_p.double()).sum(1)
        slope, r2 = achieved_strength(ratio, log_r, beta, torch.zeros(len(ratio), dtype=torch.long))
        return {"strength": slope, "r2": r2, "kl": float(ratio.mean())}


def diversity(vectors: Float[Tensor, "batch dim"], share: Float[Tensor, " batch"]) -> float:
    """Mean of 1 - cosine over pairs of different pictures, drawn by their shares, which sum to 1."""
    x, same = normalize(vectors.double(), dim=1), float(share.square().sum())
    return 1 - (float((share @ x).square().sum()) - same) / (1 - same)
