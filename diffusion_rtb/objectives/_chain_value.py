r"""V of a chain of few steps: what its own transitions lead to, instead of what the forward process says of a state.

    F(x_0) = exp(beta·r(x_0)),      F(x_t) = E_p[F(x_s) | x_t],    x_s ~ Normal(mean_p(x_t), std²)

A V that is fitted to noised samples (`BoundedValue.fit`) is that of infinitely many steps. A chain of twenty spreads less, as
DDPM's deviation is the least that there is, so F(x_t) promises more than the steps from x_t on keep. The states where that counts
are those that a guided chain goes through: V leads the prior there, is made to agree with itself along the way, and leads again.

    d = log mean_m F'(x_s^m) - log F(x_t),      loss = e^d - d - 1,   linear in d above 2

F' is a copy that follows F slowly, and m counts next states drawn anew. The loss is least where E[e^d] = 1, at the mean of F'
itself however few are drawn; the square of d would be low by half its variance. The samples that V was fitted to hold it where no
walk went.

Sources: soft Bellman backups, Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165; on denoising chains, Uehara et al. 2024,
https://arxiv.org/abs/2402.15194; the loss, Varian 1975.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from diffusion_rtb.interfaces import Walks
from diffusion_rtb.objectives._value_fit import DECAY

__all__ = ["agree", "linex"]

BATCH, DRAWS = 128, 4
FOLLOWS = 0.02
"""How much of the way to F the copy goes with each update."""
LINEAR = 2.0
"""Nats above which the loss is a straight line: one state cannot outvote all others."""


def linex(d: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """e^d - d - 1, and its tangent above `LINEAR`; at least 0, and 0 where d is."""
    bent = d.clamp(max=LINEAR)
    return bent.exp() - bent - 1 + (math.exp(LINEAR) - 1) * (d - bent)


def agree(
    logit: nn.Module,
    walks: Walks,
    end: Float[Tensor, " batch"],
    anchor: Callable[[torch.Generator], Float[Tensor, ""]],
    updates: int,
    lr: float,
) -> None:
    """Train log F = log sigmoid(logit) to be the log-mean of F over the prior's own next states.

    Args:
        logit: Of (states, timesteps, features); left trainable.
        walks: Through these states.
        end: log F(x_0) of each walk; nats, at most 0.
        anchor: The loss on noised samples of the prior, which is added.
        updates: Of AdamW, whose rate falls linearly to 0.
        lr: At the first.
    """
    logit.requires_grad_(True)
    slow = copy.deepcopy(logit).requires_grad_(False)
    optimizer = torch.optim.AdamW(logit.parameters(), lr=lr, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(0)
    batch, steps = walks.mean_p.shape[:2]
    for update in range(updates):
        row, step = (torch.randint(size, (BATCH,), generator=generator) for size in (batch, steps + 1))
        target = _target(slow, walks, end, row, step, generator)
        value = logsigmoid(logit(*_states(walks, row, step)))
        loss = linex(target - value).mean() + anchor(generator)
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(logit.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(slow.parameters()), list(logit.parameters()), FOLLOWS)


def _states(walks: Walks, row: Int[Tensor, " rows"], step: Int[Tensor, " rows"]) -> tuple[Tensor, Tensor, Tensor]:
    """States with their timesteps, 0 for x_0, and features; on the device of these."""
    device = walks.features.device
    return walks.x[row, step].to(device), walks.times[step].to(device), walks.features[row.to(device)]


@torch.no_grad()
def _target(
    slow: nn.Module,
    walks: Walks,
    end: Float[Tensor, " batch"],
    row: Int[Tensor, " rows"],
    step: Int[Tensor, " rows"],
    generator: torch.Generator,
) -> Float[Tensor, " rows"]:
    """log F by the states that follow: the log-mean of draws; the known one for x_0, and where no noise comes before it."""
    steps = len(walks.std)
    at = step.clamp(max=steps - 1)
    device, dims = walks.features.device, walks.x.ndim - 2
    noise = torch.randn(len(row), DRAWS, *walks.x.shape[2:], generator=generator)
    x_s = walks.mean_p[row, at][:, None] + walks.std[at].reshape(-1, 1, *[1] * dims) * noise
    t = walks.times[at + 1].repeat_interleave(DRAWS).to(device)
    features = walks.features[row.to(device)].repeat_interleave(DRAWS, 0)
    drawn = logsigmoid(slow(x_s.flatten(0, 1).to(device), t, features)).unflatten(0, (-1, DRAWS))
    mean = torch.logsumexp(drawn, 1) - math.log(DRAWS)
    known = (step == steps) | ((step == steps - 1) & (walks.std[-1] == 0))
    return torch.where(known.to(device), end[row.to(end.device)].to(mean), mean)
