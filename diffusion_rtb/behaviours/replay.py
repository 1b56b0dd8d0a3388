"""Trajectories that the posterior drew in earlier iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from diffusion_rtb.behaviours._memory import Memory, pack, rank_weights, stored, unpack, with_newest
from diffusion_rtb.behaviours._source import Kept, Share, Source
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.resampling import systematic_draw
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, occurrences

__all__ = ["Replay"]


class Replay(Source):
    r"""The posterior's last `capacity` own trajectories per prompt, drawn again.

    They cost no sampling and no reward, and hold on to what the posterior of today no longer visits. log_p, which does not
    change, is stored with them; log_q is computed anew. Drawn with weights

        "uniform"      1
        "reward"       1 / (0.01·n + rank of the reward)       what GFlowNets and diffusion samplers do, see `rank_weights`
        "importance"   exp(beta·r)·p / b, b: the density they were drawn with, so that what comes out is approximately of the
                       posterior p·exp(beta·r) / Z, as far as the effective sample size allows

    A trajectory keeps the density it was drawn with (`Trajectory.drawn_with`),
    so that importance weights q / b are right for "uniform". Once trajectories are selected by reward or weight, the density of
    what comes out is unknown, and objectives that need it refuse (`training/compatibility.py`). Where a prompt has
    nothing stored yet, the
    posterior draws new ones.

    Args:
        share: Share of each prompt's group that is replayed.
        capacity: Trajectories kept per prompt; the oldest go first.
        priority: Their weights.

    Sources: replay for GFlowNets, Vemgal, Lau, Precup 2023, https://arxiv.org/abs/2307.07674; by rank of the reward, Sendera et al.
    2024, https://arxiv.org/abs/2402.05098; by importance, Midgley et al. 2022, https://arxiv.org/abs/2208.01893. (Priorities
    by |residual|, Schaul et al. 2015, https://arxiv.org/abs/1511.05952, are not offered: a residual is largest where the posterior
    is worst *relative* to the prior, which on images are the least likely states.)
    """

    name = "replay"
    remembers = "take it out"

    def __init__(
        self,
        share: Share,
        capacity: PositiveInt = 256,
        priority: Literal["uniform", "reward", "importance"] = "uniform",
    ) -> None:
        self.share = share
        self.capacity = capacity
        self.priority = priority
        self.needs_noise = priority == "importance"
        if priority != "uniform":
            self.density_unknown = (
                f"once they are replayed by priority {priority!r}. Give replay `priority: uniform`, whose trajectories keep the "
                "density they were drawn with"
            )
        self.memory: Memory = {}
        self.added: dict[int, int] = {}
        """Trajectories stored so far per prompt row."""

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; log_p is known, log_q is not."""
        parts = []
        for row, nth in zip(rows, occurrences(rows), strict=True):
            if row in self.memory:
                held = self.memory[row]
                seed = seed_of(self.seed, "replay", iteration, row, nth)
                parts.append(held[systematic_draw(self.weights(held, beta), count, seed)])
            else:
                seeds = [seed_of(self.seed, "replay", iteration, row, nth, sample) for sample in range(count)]
                parts.append(sampler.draw([row] * count, seeds))
        return Batch.cat(parts)

    def weights(self, held: Batch, beta: float) -> Float[Tensor, " n"]:
        """The weight of each stored trajectory, up to a factor."""
        if self.priority == "uniform":
            return torch.ones(len(held), dtype=torch.float64)
        if self.priority == "reward":
            return rank_weights(held.reward)
        assert held.log_p is not None
        log_w = (held.log_p - held.trajectory.drawn_with).double().sum(1)
        return torch.softmax(beta * held.reward.double() + log_w, 0)

    def kept(self, own: int, drawn: int) -> Kept:
        return Kept("capacity of replay", self.capacity, each_turn=own)

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Store the posterior's own trajectories of the iteration."""
        own = stored(parts["posterior"])
        for row in torch.unique(own.prompt).tolist():
            new = own[(own.prompt == row).nonzero().flatten()]
            self.memory[row] = with_newest(self.memory, row, new, self.capacity)
            self.added[row] = self.added.get(row, 0) + len(new)

    def tensors(self) -> dict[str, Tensor]:
        return pack(self.memory, self.added)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.memory, self.added = unpack(tensors)
