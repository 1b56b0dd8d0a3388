"""How bright an image is: a reward without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase

__all__ = ["Brightness"]


class Brightness(TwoPhase):
    r"""r(x) = +mean(x) (brighten) or −mean(x) (darken) over pixels and channels, in [0, 1] or [−1, 0]. Differentiable.

    Args:
        sign: "brighten" rewards light images, "darken" dark ones.
    """

    no_gradient = ""

    def __init__(self, sign: Literal["brighten", "darken"] = "brighten") -> None:
        if sign not in ("brighten", "darken"):
            raise ValueError(f"sign is {sign!r}: use 'brighten' or 'darken'.")
        self.sign = {"brighten": 1.0, "darken": -1.0}[sign]

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        return self.sign * images.float().flatten(1).mean(1)
