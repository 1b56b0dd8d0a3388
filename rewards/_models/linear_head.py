"""Heads without activations: the five linear layers that ImageReward and LAION's aesthetic predictor share, and LAION's first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["FirstHead", "LinearHead", "aesthetic_head"]

PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers are in the published `layers`; between them it has dropout, which does nothing at inference."""


class LinearHead(nn.Module):
    """(batch, widths[0]) -> (batch,) through `widths`, published as 768-1024-128-64-16-1."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.width = widths[0]
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


class FirstHead(nn.Linear):
    """(batch, width) -> (batch,) by one linear layer, as LAION published it first: `weight` and `bias`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        self.width = width

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """One number per vector."""
        return super().forward(x)[:, 0]


def aesthetic_head(state: Mapping[str, Tensor], path: Path | str) -> LinearHead | FirstHead:
    """An empty head of the kind and the sizes of the tensors that were read from `path`.

    Raises:
        ValueError: they are no head's, or those of LAION's variant with ReLU, which is another function.
    """
    weight = state.get("weight")
    if weight is not None and weight.ndim == 2 and len(weight) == 1:
        return FirstHead(weight.shape[1])
    if {"layers.3.weight", "layers.11.weight"} <= state.keys():
        raise ValueError(
            f"{path} is LAION's head with ReLU between its layers (layers.0, 3, 6, 9 and 11, as in ava+logos-l14-reluMSE.pth); "
            "read are those without, e.g. sac+logos+ava1-l14-linearMSE.pth or sa_0_4_vit_l_14_linear.pth."
        )
    return LinearHead.sized(state, path)
