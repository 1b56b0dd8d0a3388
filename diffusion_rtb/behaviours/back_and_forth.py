"""Good samples, noised back by the forward process and denoised again by the posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from diffusion_rtb.behaviours._memory import counted, rank_weights, record_numbers
from diffusion_rtb.behaviours._source import Kept, Share, Source
from diffusion_rtb.chain.continuation import continued
from diffusion_rtb.chain.forward_process import noised_chain
from diffusion_rtb.chain.seeds import generators, seed_of
from diffusion_rtb.resampling import systematic_draw
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, occurrences

__all__ = ["BackAndForth"]


class BackAndForth(Source):
    r"""Search around good samples: x_0 -> x_t, …, x_T by the forward process, and from x_t on anew by the posterior.

        x_0 (good)  --noise-->  x_t --noise--> … --noise--> x_T          one forward chain, see `noised_chain`
                                x_t --posterior--> … --posterior--> x_0 (new)

    The trajectory is x_T, …, x_t, …, x_0 (new), with the reward of its own end. Its noised part is what the prior's chain would
    have done to end near the good sample, and teaches the early steps, which decide where a trajectory goes, states that the
    posterior may never visit. Both log-densities come from scoring. Good samples are chosen by the rank of their reward from the
    last `pool` of each prompt, the posterior's own and those that came out of this.

    The density of such a trajectory is an integral over the good samples that nobody knows, so objectives that need
    importance weights refuse (`training/compatibility.py`); squared residuals need none.

    Args:
        share: Share of each prompt's group that is made so.
        depth: Share of the chain's steps that are denoised anew, at least one step; 1: all but the very first state is new.
        pool: Samples kept per prompt, from which those noised are chosen by the rank of their reward; the oldest go first.

    Sources: noising good samples, Venkatraman et al. 2024, https://arxiv.org/abs/2405.20971 (`--back_and_forth` in its
    code, with a loss on pairs); going back and forth from samples of high reward, Kim et al. 2023, https://arxiv.org/abs/2310.02710.
    """

    name = "back_and_forth"
    density_unknown = (
        "for samples noised back: it is an integral over the good samples they may come from. Take back_and_forth out"
    )
    needs_noise = True
    remembers = "take it out"

    def __init__(self, share: Share, depth: Annotated[float, Field(gt=0, le=1)] = 0.5, pool: PositiveInt = 256) -> None:
        self.share = share
        self.depth = depth
        self.pool = pool
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """x_0 (n, *dims) and reward (n,) of each prompt row, oldest first, on the host."""
        self.added: dict[int, int] = {}
        """Samples stored so far per prompt row."""
        self.timesteps: Float[Tensor, " steps"] | None = None

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; log_q is known. A prompt without samples yet gets trajectories of the posterior."""
        pairs = [(row, n, k) for row, n in zip(rows, occurrences(rows), strict=True) for k in range(count)]
        if any(row not in self.memory for row in rows):
            seeds = [seed_of(self.seed, "back and forth", iteration, *pair) for pair in pairs]
            return sampler.draw([row for row, _, _ in pairs], seeds)
        good = torch.cat([self._good(row, n, count, iteration) for row, n in zip(rows, occurrences(rows), strict=True)])
        back, forth = ([seed_of(self.seed, way, iteration, *pair) for pair in pairs] for way in ("back", "forth"))
        texts, parts = sampler.texts([row for row, _, _ in pairs]), []
        with sampler.stopwatch("rollout"):
            for chunk in sampler.chunks(len(pairs)):
                states = self._noised(sampler, good[chunk], back[chunk])
                parts.append(continued(sampler.prior, texts[chunk], forth[chunk], states).to("cpu"))
        trajectory = sampler.joined(parts)
        batch = sampler.rewarded(trajectory, [row for row, _, _ in pairs])
        return Batch(trajectory, batch.prompt, batch.reward, log_q=trajectory.log_prob)

    def _good(self, row: int, nth: int, count: int, iteration: int) -> Float[Tensor, "count *dims"]:
        x_0, reward = self.memory[row]
        seed = seed_of(self.seed, "good", iteration, row, nth)
        return x_0[systematic_draw(rank_weights(reward), count, seed)]

    def _noised(
        self, sampler: Sampler, x_0: Float[Tensor, "batch *dims"], seeds: Sequence[int]
    ) -> Float[Tensor, "batch known *dims"]:
        """x_T, …, x_t."""
        assert self.timesteps is not None
        steps = len(self.timesteps)
        known = steps - max(1, round(self.depth * steps)) + 1
        noise = torch.stack([torch.randn(known, *x_0.shape[1:], generator=g) for g in generators(seeds)])
        device = sampler.prior.device
        return noised_chain(sampler.prior.pipe.scheduler, x_0.to(device), self.timesteps[:known].to(device), noise)

    def kept(self, own: int, drawn: int) -> Kept:
        return Kept("pool of back_and_forth", self.pool, last_state_only=True, each_turn=own + drawn)

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Remember the posterior's own samples of the iteration, and those that came out of this."""
        for part in [parts[name] for name in ("posterior", self.name) if name in parts]:
            self.timesteps = part.trajectory.timesteps
            for row in torch.unique(part.prompt).tolist():
                new = (part.prompt == row).nonzero().flatten()
                x_0, reward = part.trajectory.x_0[new], part.reward[new]
                if row in self.memory:
                    x_0, reward = torch.cat([self.memory[row][0], x_0]), torch.cat([self.memory[row][1], reward])
                self.memory[row] = x_0[-self.pool :], reward[-self.pool :]
                self.added[row] = self.added.get(row, 0) + len(new)

    def tensors(self) -> dict[str, Tensor]:
        if self.timesteps is None:
            return {}
        records = record_numbers({row: len(reward) for row, (_, reward) in self.memory.items()}, self.added)
        x_0, reward = (torch.cat([self.memory[row][i] for row in sorted(self.memory)]) for i in (0, 1))
        return {"records": records, "record.x_0": x_0, "record.reward": reward, "timesteps": self.timesteps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        self.timesteps, prompt = tensors["timesteps"], tensors["records"][:, 0]
        self.added = counted(tensors["records"])
        x_0, reward = tensors["record.x_0"], tensors["record.reward"]
        self.memory = {row: (x_0[prompt == row], reward[prompt == row]) for row in self.added}
