"""How red an image is: an example of a reward that lives in a package of its own."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from diffusion_rtb.abilities import TwoPhase

__all__ = ["Redness", "red_share"]


class Redness(TwoPhase):
    """r(x) = scale · mean(red - other), in [-scale, scale].

    Args:
        scale: Its largest value.
        against: What red is compared with: the mean of green and blue, or the larger of the two.
    """

    def __init__(self, scale: float = 1.0, *, against: Literal["mean", "max"] = "mean") -> None:
        if scale == 0:
            raise ValueError("scale is 0: every image would have the same reward.")
        self.scale, self.against = scale, against

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, others = images[:, 0], images[:, 1:]
        other = others.mean(1) if self.against == "mean" else others.amax(1)
        return self.scale * (red - other).flatten(1).mean(1)


def red_share(images: Tensor, prompts: Sequence[str], threshold: float = 0.1) -> Tensor:
    """r(x) = share of pixels whose red exceeds green and blue by the threshold, in [0, 1]."""
    return (images[:, 0] > images[:, 1:].amax(1) + threshold).float().flatten(1).mean(1)
