"""Trajectories of the prior, re-sampled by their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.actor import Actor, Experience
from diffusion_rtb.seeds import seed_of
from diffusion_rtb.trajectory import Trajectory

__all__ = ["PriorBuffer", "systematic_resample"]


def systematic_resample(weights: Float[Tensor, " n"], count: int, u: float) -> Int[Tensor, " count"]:
    """Indices drawn with probability ∝ weights, each index at most one away from count·weight times.

    Args:
        weights: Non-negative, not all zero.
        count: How many to draw.
        u: In [0, 1); the one random number of the scheme (Kitagawa 1996, doi 10.2307/1390750).
    """
    edges = (weights.double() / weights.double().sum()).cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + u) / count
    return torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)


class PriorBuffer:
    """A share of each batch from the prior: cheap, covering, and carrying its own log_p.

    Per prompt it keeps the last `size` prior trajectories, all drawn on first use, and adds `refresh` new ones each time the
    prompt is drawn. With `resample` they are drawn with weights exp(beta·r), that is, approximately from the posterior: the
    one behaviour that found all modes in the right proportions where exploration noise alone did not.

    Args:
        seed: The run's seed.
        size: Prior trajectories kept per prompt.
        resample: Draw with weights exp(beta·r) instead of uniformly.
        refresh: New prior trajectories per prompt and draw.
    """

    def __init__(self, seed: int, *, size: int, resample: bool = True, refresh: int = 0) -> None:
        self.seed = seed
        self.size = size
        self.resample = resample
        self.refresh = refresh
        self.memory: dict[int, Experience] = {}
        self.drawn: dict[int, int] = {}
        """Prior trajectories drawn so far per prompt row; the next one's seed follows from it."""

    def draw(self, actor: Actor, rows: Sequence[int], count: int, iteration: int, beta: float) -> Experience:
        """See `Source`; log_p is known, log_q is not."""
        self._extend(actor, rows)
        parts = []
        for row in rows:
            held = self.memory[row]
            weights = torch.softmax(beta * held.reward.double(), 0) if self.resample else torch.ones(len(held))
            generator = torch.Generator().manual_seed(seed_of(self.seed, "resample", iteration, row))
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
            parts.append(held[systematic_resample(weights, count, u)])
        return Experience.cat(parts).to(actor.prior.device)

    def everything(self, actor: Actor) -> Experience:
        """All stored trajectories of all prompts, with log_p; buffers that are empty are filled first."""
        self._extend(actor, [row for row in range(len(actor.prompts)) if row not in self.memory])
        return Experience.cat([self.memory[row] for row in sorted(self.memory)]).to(actor.prior.device)

    def _extend(self, actor: Actor, rows: Sequence[int]) -> None:
        """Fill the buffers of new rows, refresh those of old ones; nothing changes unless all of it succeeds."""
        wanted = [(row, self.refresh if row in self.memory else self.size) for row in rows]
        pairs = [(row, self.drawn.get(row, 0) + k) for row, count in wanted for k in range(count)]
        if not pairs:
            return
        seeds = [seed_of(self.seed, "prior", row, k) for row, k in pairs]
        fresh = actor.from_prior([row for row, _ in pairs], seeds).to("cpu")
        start = 0
        for row, count in wanted:
            part = fresh[start : start + count]
            start += count
            held = Experience.cat([self.memory[row], part]) if row in self.memory else part
            self.memory[row] = held[max(0, len(held) - self.size) :]
            self.drawn[row] = self.drawn.get(row, 0) + count

    def tensors(self) -> dict[str, Tensor]:
        if not self.memory:
            return {}
        rows = sorted(self.memory)
        held = Experience.cat([self.memory[row] for row in rows])
        assert held.log_p is not None
        drawn = torch.tensor([[row, self.drawn[row]] for row in rows])
        trajectory = {f"trajectory.{name}": tensor for name, tensor in held.trajectory.tensors().items()}
        return trajectory | {"prompt": held.prompt, "reward": held.reward, "log_p": held.log_p, "drawn": drawn}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        fields = {name.removeprefix("trajectory."): t for name, t in tensors.items() if name.startswith("trajectory.")}
        held = Experience(
            trajectory=Trajectory(**fields), prompt=tensors["prompt"], reward=tensors["reward"], log_p=tensors["log_p"]
        )
        self.drawn = {int(row): int(count) for row, count in tensors["drawn"]}
        self.memory = {row: held[(held.prompt == row).nonzero().flatten()] for row in self.drawn}
