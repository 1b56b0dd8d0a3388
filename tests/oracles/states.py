"""States as an objective of states sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.interfaces import States


def states_of(mean_q: Tensor, mean_p: Tensor, **changed: Any) -> States:
    """In the middle of a chain; `mean_old` in `changed` is the older posterior's."""
    means = {"prior": mean_p} | ({"old": changed.pop("mean_old")} if "mean_old" in changed else {})
    given = States(
        step=1,
        share=0.5,
        dense=4,
        x_t=mean_q,
        x_0=mean_q,
        following=300.0,
        std=0.7,
        mean_q=mean_q,
        means=means,
        mean_0=None,
        prompt=torch.zeros(len(mean_q), dtype=torch.long),
        reward=torch.zeros(len(mean_q)),
        features=torch.zeros(len(mean_q), 0),
        generator=torch.Generator().manual_seed(0),
    )
    return replace(given, **changed)
