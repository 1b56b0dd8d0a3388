"""How well pictures fit their own prompts: by a score, and by whether the own prompt fits better than the run's other ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import Labeller
from diffusion_rtb.config.components import describe
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics._sides import arrow, refuse_vectors, side_means_of
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.scoring.call import evaluate_reward

__all__ = ["Alignment", "retrieved"]


class Alignment(Metric):
    """The mean score of a picture and its prompt, and the share of pictures whose own prompt fits best of all that are evaluated.

    A raw cosine has no scale; the share has one: 1/n where the pictures have nothing to do with their n prompts, 1 where each shows
    its own. It needs a scorer with `classify(images, classes)`, as `clip_score` has. R-precision of Park et al., "Benchmark for
    Compositional Text-to-Image Synthesis", 2021, https://openreview.net/forum?id=bKBhQhPeKaF, among the run's own prompts.

    Args:
        scorer: A reward as a component, of pictures and prompts. Take another one than the reward: that one was trained for.
    """

    name, needs, columns = "alignment", None, ("alignment", "own prompt")

    def __init__(self, scorer: Mapping[str, Any] | None = None) -> None:
        self.described = describe({"component": "clip_score"} if scorer is None else scorer, "reward")
        self.prompts: tuple[str, ...] = ()

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Load the scorer.

        Raises:
            ValueError: it is one that only tells classes apart, without a score of a picture and a prompt.
        """
        self.prompts, self.scorer = tuple(prompts), self.described.build()
        if not callable(self.scorer):
            raise ValueError(
                f"eval.metrics: alignment needs a scorer that is a reward, and {self.described.name!r} cannot be called with "
                "images and prompts; take `clip_score`."
            )

    def scores(
        self, images: Float[Tensor, "batch *shape"], prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """`score` of each picture, and `own`: whether its own prompt fits best.

        Raises:
            ValueError: the samples are vectors.
        """
        refuse_vectors(self.name, images)
        found = {"score": evaluate_reward(self.scorer, images, prompts, self.described.name, metadata=metadata)}
        if isinstance(self.scorer, Labeller) and len(self.prompts) > 1:
            own = torch.tensor([self.prompts.index(prompt) for prompt in prompts])
            found["own"] = retrieved(self.scorer.classify(images, self.prompts).cpu(), own)
        return found

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any] | None:
        """Both numbers of prior, re-weighted prior and posterior, with intervals; None of what was not asked of the samples."""
        sides = prior, posterior
        score, own = (
            side_means_of([self.kept(side, name) for side in sides], *sides, beta, config) for name in ("score", "own")
        )
        if score is None:
            return None
        chance = None if own is None else 1 / len(self.prompts)
        return {"scorer": self.described.name, "score": score, "own_prompt": own, "chance": chance}

    def row(self, value: Any) -> tuple[str, ...]:
        """Prior and posterior of both."""
        return tuple("-" if value[key] is None else arrow(value[key]) for key in ("score", "own_prompt"))

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Both, where they are known."""
        labels = (("score", f"alignment ({value['scorer']})"), ("own_prompt", "own prompt fits best, share"))
        return {label: value[key] for key, label in labels if value[key]}


def retrieved(log_p: Float[Tensor, "batch prompts"], own: Tensor) -> Float[Tensor, " batch"]:
    """1 where the own prompt fits best, 0 where another one does, 1/k where it is one of k that fit equally well.

    So a scorer that sees nothing has chance, 1/n, and not 1 for whoever comes first.
    """
    best = log_p == log_p.max(1, keepdim=True).values
    return best.gather(1, own[:, None])[:, 0].float() / best.sum(1)
