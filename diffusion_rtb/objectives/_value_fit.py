"""Fit a network to the soft value of the prior's states, from samples of the prior alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_rtb.interfaces import Terms

__all__ = ["DECAY", "Noise", "fit_value", "some_states"]

Noise = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""x_t of (x_0, timesteps, generator)."""

BATCH = 256
DECAY = 0.01
AT_ONCE = 2**14
"""Pixels that go through the network together. With more of them a CPU spends its time on getting memory and giving it back: an
update on pictures of 32x32 took 0.45 s in one piece, 0.2 s so. A batch of latents of 8x8 is one piece."""


def fit_value(
    network: nn.Module,
    terms: Terms,
    loss: Callable[[Float[Tensor, " rows"], Int[Tensor, " rows"]], Float[Tensor, ""]],
    noise: Noise | None,
    updates: int,
    lr: float,
    *,
    ends: bool = False,
) -> None:
    """AdamW on random states of random samples; its rate falls linearly to 0. The network is left trainable.

    Args:
        network: Of (states, timesteps, features).
        terms: Trajectories of the prior, or their x_0 alone.
        loss: Of what the network says of some states, and the rows of `terms` that these belong to; a mean over them.
        noise: The forward process; None: the states are those of the trajectories.
        updates: How many.
        lr: At the first.
        ends: Take x_0 itself, at timestep 0, in the place of x_T, of which nothing can be known.
    """
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(0)
    for update in range(updates):
        x_t, t, row = some_states(terms, noise, generator, ends=ends)
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        optimizer.zero_grad()
        for piece in torch.arange(BATCH).split(max(1, AT_ONCE // math.prod(x_t.shape[2:]))):
            value = network(x_t[piece], t[piece], terms.features[row[piece]])
            (loss(value, row[piece]) * (len(piece) / BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def some_states(
    terms: Terms, noise: Noise | None, generator: torch.Generator, *, ends: bool
) -> tuple[Float[Tensor, "rows *dims"], Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Random states of random samples with their timesteps, and the rows of `terms` that they belong to; see `fit_value`."""
    row = torch.randint(len(terms.reward), (BATCH,), generator=generator)
    i = torch.randint(len(terms.timesteps), (BATCH,), generator=generator)
    t = terms.timesteps[i]
    x = terms.x[row, i if noise is None else -1].to(terms.features.device)
    x_t = x if noise is None else noise(x, t, generator)
    if ends:
        end = (i == 0).to(t.device)
        t, x_t = t.where(~end, 0.0), x_t.where(~end.reshape(-1, *[1] * (x.ndim - 1)), x)
    return x_t, t, row
