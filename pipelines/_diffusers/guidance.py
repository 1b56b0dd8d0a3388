r"""Classifier-free guidance, and which prior is tilted with it. With guidance scale g > 1 a step uses the network output

    e_g(x_t) = e(x_t, "") + g · (e(x_t, prompt) - e(x_t, ""))

*guided*    p is the chain that samples with e_g, q_theta the same chain with the LoRA in both branches, the same g. It is
            an ordinary chain of Gaussian transitions, so log q - log p and log Z are exact for it; what is tilted is what
            the pipeline draws, not p(x | prompt) itself. Two network evaluations per step.
*unguided*  g = 1: p is the conditional model itself, one evaluation per step. The tuned network must then be *sampled* with
            g = 1 too: e_g mixes a tuned and a never-trained branch, and what it draws is a sample of neither posterior.

So g is one number for prior and posterior, it belongs to the fingerprint, and a checkpoint is refused by a prior with another one.

Classifier-free guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Guidance", "TiltedPrior"]

TiltedPrior = Literal["guided", "unguided"]


@dataclass(frozen=True)
class Guidance:
    """A guidance scale, checked against what is said beside it: settings that contradict it would be silently ignored."""

    scale: float = 1.0
    stated: TiltedPrior | None = None
    """Which prior is tilted, as the config states it."""
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.scale < float("inf"):
            raise ValueError(
                f"guidance={self.scale}: a guidance scale is a number >= 1; 1 samples the conditional model itself."
            )
        if self.stated not in (None, self.tilted_prior):
            remedy = "set guidance=1.0" if self.stated == "unguided" else "set guidance above 1, for example 5.0"
            raise ValueError(
                f"tilted_prior={self.stated!r}, but guidance={self.scale} samples the {self.tilted_prior} chain, and a posterior "
                f"is exact only for the chain it is trained on: {remedy}, or tilted_prior={self.tilted_prior!r}."
            )
        if self.negative_prompt and self.scale == 1:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} has no effect at guidance=1: raise guidance, or leave it out."
            )

    @property
    def tilted_prior(self) -> TiltedPrior:
        """Which prior the posterior tilts."""
        return "guided" if self.scale > 1 else "unguided"

    def settings(self, argument: str | None) -> dict[str, Any]:
        """Arguments of a pipeline's call, of which `argument` takes the scale; none where it has none."""
        if argument is None:
            return {}
        negative = {} if self.scale == 1 or self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return {argument: self.scale} | negative

    def fingerprint(self) -> dict[str, Any]:
        """As plain JSON values."""
        negative = self.negative_prompt if self.scale > 1 else None
        return {"tilted_prior": self.tilted_prior, "scale": float(self.scale), "negative_prompt": negative}
