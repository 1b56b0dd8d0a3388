"""The head that ImageReward and LAION's aesthetic predictor share: five linear layers, without activations in between."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LinearHead"]

PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers are in the published `layers`; between them it has dropout, which does nothing at inference."""


class LinearHead(nn.Module):
    """(batch, widths[0]) -> (batch,) through `widths`, published as 768-1024-128-64-16-1."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        steps = dict(zip(PLACES, pairwise(widths), strict=True))
        self.layers = nn.Sequential(
            *(nn.Linear(*steps[i]) if i in steps else nn.Identity() for i in range(PLACES[-1] + 1))
        )

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """One number per vector."""
        return self.layers(x)[:, 0]

    @staticmethod
    def sized(state: Mapping[str, Tensor], path: Path | str, prefix: str = "") -> LinearHead:
        """An empty head with the sizes of the tensors that were read from `path`; ValueError if they are not a head's."""
        shapes = [tuple(state[name].shape) for i in PLACES if (name := f"{prefix}layers.{i}.weight") in state]
        chained = all(a[0] == b[1] for a, b in pairwise(shapes))
        if len(shapes) != len(PLACES) or not chained or shapes[-1][0] != 1:
            raise ValueError(
                f"{path} holds no head of {len(PLACES)} linear layers that ends in one number: {prefix}layers.N.weight has "
                f"the shapes {shapes} at N = {PLACES}."
            )
        return LinearHead((shapes[0][1], *(shape[0] for shape in shapes)))
