"""Do the pictures say what their prompts quote? By optical character recognition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics._sides import arrow, refuse_vectors, side_means_of
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.scoring.prompts import check_component_prompts

__all__ = ["OcrAccuracy"]


class OcrAccuracy(Metric):
    """Mean of 1 - min(D, n)/n, D the edit distance of the recognised to the quoted text of n characters; the share of D = 0.

    Spaces and case do not count; every character beside the quoted text does, as with `extra: counted` of the reward `ocr`, so
    that a picture full of letters is no exact match.

    Args:
        reader: A reward as a component that answers that number; by default `ocr` (the extra of that name).
    """

    name, needs, columns = "ocr", None, ("text", "exact text")

    def __init__(self, reader: Mapping[str, Any] | None = None) -> None:
        self.component = {"component": "ocr", "extra": "counted"} if reader is None else dict(reader)
        self.described = describe(self.component, "reward")

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Load the recogniser.

        Raises:
            ValueError: a prompt quotes no text.
        """
        try:
            check_component_prompts(self.component, prompts, metadata)
        except ValueError as error:
            raise ValueError(
                f"eval.metrics: ocr: {error} Evaluate those that do (eval.prompts), or leave it out."
            ) from error
        self.reader = self.described.build()

    def scores(
        self, images: Float[Tensor, "batch *shape"], prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """`text` in [0, 1] of each picture, and `exact`: whether it is 1.

        Raises:
            ValueError: the samples are vectors.
        """
        refuse_vectors(self.name, images)
        text = evaluate_reward(self.reader, images, prompts, self.described.name, metadata=metadata)
        return {"text": text, "exact": torch.where(text == 1, 1.0, 0.0)}

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any] | None:
        """Both numbers of prior, re-weighted prior and posterior, with intervals; None where the samples were not read."""
        sides = prior, posterior
        found = {
            name: side_means_of([self.kept(side, name) for side in sides], *sides, beta, config)
            for name in ("text", "exact")
        }
        return found if found["text"] is not None else None

    def row(self, value: Any) -> tuple[str, ...]:
        """Prior and posterior of both."""
        return tuple(arrow(sides) for sides in value.values())

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """Both."""
        labels = {"text": "OCR, 1 - edit distance per character", "exact": "OCR, share of exact texts"}
        return {labels[key]: sides for key, sides in value.items()}
