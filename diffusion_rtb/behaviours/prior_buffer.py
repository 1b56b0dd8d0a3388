"""Trajectories of the prior, re-sampled by their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_rtb.behaviours._memory import Memory, pack, unpack, with_newest
from diffusion_rtb.behaviours._source import Kept, Share, Source
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.resampling import systematic_draw
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.noising import noised_anew
from diffusion_rtb.sampling.sampler import Sampler, numbered, occurrences

__all__ = ["PriorBuffer", "prior_trajectories"]


def prior_trajectories(
    sampler: Sampler, run_seed: int, pairs: Sequence[tuple[int, int]], between: Callable[[], object] = lambda: None
) -> Iterator[Batch]:
    """Trajectories of the prior, with log_p and reward: one micro-batch after the other.

    `pairs` is (prompt row, number) of each; the number decides its noise. `between` is called before each micro-batch; what it
    raises ends the drawing.
    """
    for chunk in sampler.chunks(len(pairs)):
        between()
        here = pairs[chunk]
        seeds = [seed_of(run_seed, "prior", *pair) for pair in here]
        yield sampler.draw([row for row, _ in here], seeds, of_prior=True)


class PriorBuffer(Source):
    """A share of each batch from the prior: cheap, covering, and carrying its own log_p.

    Per prompt it keeps the last `capacity` prior trajectories, all drawn on first use, and adds `refresh` new ones each time the
    prompt is drawn. With `resample` they are drawn with weights exp(beta·r), that is, approximately from the posterior: the
    one behaviour that found all modes in the right proportions where exploration noise alone did not.

    With `noised` it keeps of each only x_0, and a draw noises it anew by the scheduler's forward process: few bytes give
    unlimited states, to objectives that learn from states alone and to squared residuals alike.

    What is stored is on the CPU, and is drawn, decoded and scored one micro-batch at a time: neither the device nor the reward ever
    sees more. Buffers are filled prompt by prompt, so that a prompt's trajectories do not depend on which others it is drawn with.

    An objective's warm-up takes its trajectories from here too, `capacity` per prompt: all that there are with a share, and without
    one such as are drawn once and not kept.

    Args:
        share: Share of each prompt's group; 0: for a warm-up alone.
        capacity: Prior trajectories per prompt; the oldest go first.
        resample: Draw with weights exp(beta·r) instead of uniformly.
        refresh: New prior trajectories per prompt and draw; they replace the oldest.
        noised: Keep x_0 alone, and give it a new forward chain at each draw.
    """

    name = "prior"

    def __init__(
        self,
        share: Share = 0.0,
        capacity: PositiveInt = 64,
        resample: bool = True,
        refresh: NonNegativeInt = 0,
        noised: bool = False,
    ) -> None:
        if refresh > capacity:
            raise ValueError(f"refresh {refresh} is larger than the capacity {capacity} it goes into.")
        self.share = share
        self.capacity = capacity
        self.resample = resample
        self.refresh = refresh
        self.noised = noised
        self.tilted = resample and noised
        self.posterior_like = resample
        if resample:
            self.density_unknown = "once they are selected by their reward. Give prior_buffer `resample: false`"
        if noised:
            self.density_unknown = "once they are noised anew. Give prior_buffer `noised: false` and `resample: false`"
        if refresh:
            self.remembers = "give prior_buffer `refresh: 0`"
        self.memory: Memory = {}
        self.drawn: dict[int, int] = {}
        """Prior trajectories drawn so far per prompt row; the next one's seed follows from it."""
        self.extended: tuple[Memory, dict[int, int]] = {}, {}
        """What memory and drawn become once the iteration has succeeded."""
        self.between: Callable[[], object] = lambda: None
        """Called before each micro-batch that fills a buffer; what it raises ends the filling, and nothing of it is kept."""

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; log_p is known, log_q is not."""
        self.extended = self._extended(sampler, rows)
        parts = []
        for row, nth in zip(rows, occurrences(rows), strict=True):
            held = self.extended[0][row]
            weights = torch.softmax(beta * held.reward.double(), 0) if self.resample else torch.ones(len(held))
            seed = seed_of(self.seed, "resample", iteration, row, *([nth] if nth else []))
            parts.append(held[systematic_draw(weights, count, seed)])
        drawn = Batch.cat(parts)
        return noised_anew(sampler, drawn, seed_of(self.seed, "noised", iteration)) if self.noised else drawn

    def everything(self, sampler: Sampler) -> list[Batch]:
        """All stored trajectories, one batch per prompt, with log_p; buffers that are empty are filled first."""
        missing = [row for row in range(len(sampler.prompts)) if row not in self.memory]
        self.memory, self.drawn = self._extended(sampler, missing)
        return [self.memory[row] for row in sorted(self.memory)]

    def passing(self, sampler: Sampler, between: Callable[[], object]) -> Iterator[Batch]:
        """What empty buffers would be filled with, of all prompts, micro-batch by micro-batch; nothing is stored."""
        pairs = numbered(range(len(sampler.prompts)), self.capacity)
        return prior_trajectories(sampler, self.seed, pairs, between)

    def _extended(self, sampler: Sampler, rows: Sequence[int]) -> tuple[Memory, dict[int, int]]:
        """Memory and counts with the buffers of new rows filled and those of old ones refreshed."""
        memory, drawn = dict(self.memory), dict(self.drawn)
        known = [row for row in dict.fromkeys(rows) if row in memory]
        for row in dict.fromkeys(rows):
            if row not in memory:
                first = numbered([row], self.capacity)
                memory[row] = Batch.cat(
                    [self._kept(b) for b in prior_trajectories(sampler, self.seed, first, self.between)]
                )
                drawn[row] = self.capacity
        pairs = [(row, drawn[row] + k) for row in known for k in range(self.refresh)]
        if pairs:
            fresh = Batch.cat([self._kept(batch) for batch in prior_trajectories(sampler, self.seed, pairs)])
            for row in known:
                memory[row] = with_newest(memory, row, fresh[(fresh.prompt == row).nonzero().flatten()], self.capacity)
                drawn[row] += self.refresh
        return memory, drawn

    def _kept(self, drawn: Batch) -> Batch:
        if not self.noised:
            return drawn
        trajectory = drawn.trajectory
        return replace(drawn, trajectory=replace(trajectory, x=trajectory.x[:, -1:].clone()))  # a view would hold all

    def kept(self, own: int, drawn: int) -> Kept:
        return Kept("capacity of prior_buffer", self.capacity, last_state_only=self.noised)

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Keep the prior trajectories that the iteration added."""
        if self.name in parts:
            self.memory, self.drawn = self.extended

    def tensors(self) -> dict[str, Tensor]:
        return pack(self.memory, self.drawn)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.memory, self.drawn = unpack(tensors)
