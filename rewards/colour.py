"""How close an image is to one colour: a reward without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase

__all__ = ["Colour"]


class Colour(TwoPhase):
    r"""r(x) = −mean (x − c)² over pixels and channels, in [−1, 0]; 0 is an image of nothing but the colour c. Differentiable.

    As mean (x − c)² = (mean x − c)² + var x per channel, it asks for the right mean colour and for a plain image.

    Args:
        colour: A name or code that CSS knows ("tomato", "#ff6347", "rgb(255, 99, 71)"), or red, green, blue in [0, 1].
    """

    no_gradient = ""

    def __init__(self, colour: str | list[float]) -> None:
        self.colour = _rgb(colour)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        colour = torch.tensor(self.colour, dtype=torch.float32, device=images.device)
        return -(images.float() - colour[:, None, None]).square().flatten(1).mean(1)


def _rgb(colour: str | list[float]) -> tuple[float, ...]:
    """Red, green and blue in [0, 1]."""
    if isinstance(colour, str):
        from PIL import ImageColor

        from diffusion_rtb.config.component_errors import nearest

        try:
            return tuple(level / 255 for level in ImageColor.getrgb(colour)[:3])
        except ValueError:
            hint = nearest(colour.lower(), ImageColor.colormap)
            raise ValueError(
                f"{colour!r} is no colour.{hint} Use a name or code of CSS ('tomato', '#ff6347'), or [red, green, blue] in [0, 1]."
            ) from None
    if len(colour) != 3 or not all(0 <= level <= 1 for level in colour):
        raise ValueError(f"colour is {colour}: three numbers in [0, 1], red, green, blue, e.g. [1.0, 0.39, 0.28].")
    return tuple(colour)
