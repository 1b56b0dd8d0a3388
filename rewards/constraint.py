"""What must not be in an image, as a penalty, judged by any classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.scoring.call import RewardError
from rewards._nested import Nested, inner_values

__all__ = ["Constraint"]

ABOVE = 1e-4
"""By how much rounding may put a log-probability above 0, nats."""


class Constraint(Nested):
    r"""r(x) = 0 where p(unwanted | x) <= limit, and below 0, down to −penalty, above.

        "step":   r = −penalty                                          "hinge":  r = −penalty·(p − limit) / (1 − limit)

    For a part of `weighted_sum` beside the reward that says what is wanted: with beta·penalty nats, an image
    that breaks the constraint for certain keeps exp(−beta·penalty) of its weight in the posterior. The step is the
    constraint itself; the hinge also says which way is better.

    Args:
        classifier: A reward whose values are log p(unwanted | x) in nats, e.g. `{component: classifier, target: 1,
            classes: [a safe photo, a nude photo], model: ...}`.
        limit: The largest p that is allowed, in [0, 1).
        penalty: In units of the reward; positive.
        kind: "step" or "hinge".
    """

    def __init__(
        self,
        classifier: Mapping[str, Any],
        *,
        limit: float = 0.5,
        penalty: float = 10.0,
        kind: Literal["step", "hinge"] = "step",
    ) -> None:
        if not 0 <= limit < 1:
            raise ValueError(f"limit is {limit}: it is a probability in [0, 1).")
        if not 0 < penalty < math.inf:
            raise ValueError(
                f"penalty is {penalty}: it must be positive and finite (the sign is the constraint's own)."
            )
        if kind not in ("step", "hinge"):
            raise ValueError(f"kind is {kind!r}: use 'step' or 'hinge'.")
        super().__init__([classifier])
        (self.name,) = self.inner
        self.limit, self.penalty, self.kind = limit, penalty, kind

    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        p = self.probability(images, prompts, metadata)
        if self.kind == "step":
            return -self.penalty * (p > self.limit).to(p.dtype)
        return -self.penalty * (p - self.limit).clamp(min=0) / (1 - self.limit)

    @property
    def no_gradient(self) -> str | None:
        """A step has no slope."""
        return super().no_gradient if self.kind == "hinge" else "a step has no slope: set kind: hinge"

    def probability(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        """p(unwanted | x), in [0, 1].

        Raises:
            RewardError: the classifier gave something above 0, which is no log-probability.
        """
        log_p = inner_values(self.rewards[self.name], images, prompts, self.name, metadata)
        highest = float(log_p.detach().max()) if len(log_p) else 0.0
        if highest > ABOVE:
            raise RewardError(
                f"Reward {self.name!r} gave {highest:.4g} where a log-probability, at most 0, is needed: name a reward that "
                "returns log p(unwanted | x), as `classifier` does."
            )
        return torch.exp(log_p.clamp(max=0))
