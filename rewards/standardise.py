"""A reward in units of its own spread, so that beta means the same whatever the reward's scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.scoring.call import RewardError
from diffusion_rtb.scoring.memory import Gather
from rewards._nested import Nested, inner_values

__all__ = ["Standardise"]

ROUNDING, SMALLEST = 1e-7, 1e-30
"""A spread below this share of the mean is that of float32 numbers which are all the same; below the other it has no inverse."""

FIRST_SAMPLES = 256
"""Samples of the prior before training where the statistics never stay."""


class Standardise(Nested):
    r"""r(x) = (r_inner(x) − mean) / std, with beta then in nats per standard deviation of the inner reward.

    mean and std are given, or learned from `samples` samples of the prior before training starts, spread over the prompts. From
    then on they stay, since a std that moves moves the posterior p(x)·exp(beta·r(x)) with it, and a trajectory that is kept
    would keep the reward of another day. With `samples: null` they do move: every iteration's rewards are merged into running
    ones (Chan et al., "Algorithms for Computing the Sample Variance", 1983, https://doi.org/10.1080/00031305.1983.10483115), and
    an iteration's values use what the earlier ones taught. Values without spread are divided by 1. Statistics learned are part of
    a run's checkpoints (`diffusion_rtb/scoring/memory.py`).

    Args:
        reward: The inner reward, `{component: NAME, argument: value}`.
        mean: Known mean; together with `std`.
        std: Known standard deviation, e.g. the prior's, which `eval.py` prints; together with `mean`.
        samples: Samples of the prior that the statistics are learned from; None: from 256 at first, and they never stay.
    """

    def __init__(
        self,
        reward: Mapping[str, Any],
        *,
        mean: float | None = None,
        std: float | None = None,
        samples: int | None = 256,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"mean is {mean} and std is {std}: give both, or neither to learn them while training.")
        if mean is not None and not math.isfinite(mean):
            raise ValueError(f"mean is {mean}: it must be finite.")
        if std is not None and not 0 < std < math.inf:
            raise ValueError(f"std is {std}: it must be finite and positive.")
        if samples is not None and samples < 2:
            raise ValueError(f"samples is {samples}: a standard deviation needs at least 2 images; None never stops.")
        super().__init__([reward])
        (self.name,) = self.inner
        self.samples = samples
        self._known = None if mean is None or std is None else (mean, std)
        self._settled = torch.zeros(3, dtype=torch.float64)
        self._pending: Tensor | None = None

    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        values = inner_values(self.rewards[self.name], images, prompts, self.name, metadata)
        if self._pending is not None:
            self._pending = merged(self._pending, moments(values))
        mean, std = self.statistics()
        return ((values.double() - mean) / std).to(values.dtype)  # a spread far below the mean would drown in float32

    def statistics(self) -> tuple[float, float]:
        """The mean and the standard deviation in use.

        Raises:
            RewardError: nothing was observed yet.
        """
        if self._known is not None:
            return self._known
        row = self._settled if self._settled[0] > 0 or self._pending is None else self._pending
        count, mean, squares = row.tolist()
        if count == 0:
            raise RewardError(
                f"standardise has seen no values of {self.name!r} yet: it learns its statistics before training and takes them "
                "from a run's checkpoint. Elsewhere give `mean` and `std`."
            )
        std = math.sqrt(squares / count)
        return mean, std if std > max(ROUNDING * abs(mean), SMALLEST) else 1.0

    # diffusion_rtb.scoring.memory.StatefulReward

    @property
    def wanted(self) -> int:
        """Samples of the prior to see before training."""
        if self._known is not None:
            return 0
        if self.samples is None:
            return FIRST_SAMPLES if self._settled[0] == 0 else 0
        return max(0, self.samples - int(self._settled[0]))

    @property
    def moves(self) -> bool:
        """Whether the statistics go on changing while training."""
        return self._known is None and self.samples is None

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._settled[0] == 0 else {"moments": self._settled.clone()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) - {"moments"}:
            raise ValueError(f"standardise remembers 'moments', not {sorted(tensors)}.")
        self._settled = tensors["moments"].double().cpu().clone() if tensors else torch.zeros(3, dtype=torch.float64)

    def observe(self) -> None:
        learning = self._known is None and (self.samples is None or self._settled[0] < self.samples)
        self._pending = torch.zeros(3, dtype=torch.float64) if learning else None

    def settle(self, gather: Gather | None) -> None:
        pending, self._pending = self._pending, None
        if pending is None or gather is None:
            return
        for row in gather(pending[None]).double().cpu():
            self._settled = merged(self._settled, row)


def moments(values: Float[Tensor, " batch"]) -> Float[Tensor, "3"]:
    """(count, mean, sum of squared deviations from the mean), float64."""
    values = values.detach().double().cpu()
    if len(values) == 0:
        return torch.zeros(3, dtype=torch.float64)
    mean = values.mean()
    return torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), mean, (values - mean).square().sum()])


def merged(one: Float[Tensor, "3"], other: Float[Tensor, "3"]) -> Float[Tensor, "3"]:
    """The moments of two samples together, from those of each."""
    count = one[0] + other[0]
    if count == 0:
        return one
    apart = other[1] - one[1]
    mean = one[1] + apart * other[0] / count
    return torch.stack([count, mean, one[2] + other[2] + apart.square() * one[0] * other[0] / count])
