"""A reward kept within bounds: beyond them nothing more is to be gained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.exact import HasLogRatio, LogRatio
from rewards._nested import Nested, inner_values

__all__ = ["Clamp"]


class Clamp(Nested):
    r"""r(x) = min(max(r_inner(x), low), high).

    A lower bound keeps single failures from dominating the residual; an upper bound says what is good enough. A bound
    that most images reach leaves no direction to learn: `check-reward` shows the share.

    Args:
        reward: The inner reward, `{component: NAME, argument: value}`.
        low: Lower bound; None: none.
        high: Upper bound; None: none.
    """

    def __init__(self, reward: Mapping[str, Any], *, low: float | None = None, high: float | None = None) -> None:
        if low is None and high is None:
            raise ValueError(
                "clamp has neither `low` nor `high`: give at least one, or use the inner reward by itself."
            )
        for name, value in (("low", low), ("high", high)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: it must be finite; leave it out for no bound.")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low is {low} and high is {high}: low must be below high, or every image has one reward.")
        super().__init__([reward])
        (self.name,) = self.inner
        self.low, self.high = low, high

    def log_ratio(self) -> LogRatio | None:
        """The inner reward's, if it is one without bounds of its own, within these."""
        inner = self.inner[self.name].construct()
        ratio = inner.log_ratio() if isinstance(inner, HasLogRatio) else None
        if ratio is None or (ratio.low, ratio.high) != (None, None):
            return None
        return replace(ratio, low=self.low, high=self.high)

    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        return inner_values(self.rewards[self.name], images, prompts, self.name, metadata).clamp(self.low, self.high)
