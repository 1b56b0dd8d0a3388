"""The forward process of a scheduler: x_t given x_0, without any network."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["noised"]


def noised(
    scheduler: Any,
    x_0: Float[Tensor, "batch *dims"],
    timesteps: Float[Tensor, " batch"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *dims"]:
    """x_t ~ q(x_t | x_0) of each sample at its own timestep, e.g. sqrt(a)·x_0 + sqrt(1 - a)·noise with a = alpha_bar_t.

    Args:
        scheduler: Whose `add_noise` (or `scale_noise`, flow matching) is asked; its timesteps must be set.
        x_0: Clean samples.
        timesteps: Of that scheduler.
        generator: On the CPU.

    Raises:
        ValueError: the scheduler has no forward process.
    """
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    if hasattr(scheduler, "add_noise"):
        whole = bool((timesteps == timesteps.round()).all())
        answer: Tensor = scheduler.add_noise(x_0, noise, timesteps.long() if whole else timesteps)
    elif hasattr(scheduler, "scale_noise"):
        answer = scheduler.scale_noise(x_0, timesteps, noise)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} has neither add_noise nor scale_noise, so states cannot be noised; use recorded ones."
        )
    return answer
