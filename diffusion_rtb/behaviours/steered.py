"""Trajectories of the prior, steered towards the posterior by sequential Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt

from diffusion_rtb.behaviours._source import Share, Source
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, occurrences
from diffusion_rtb.steering import steered
from diffusion_rtb.steering.smc import SMC

__all__ = ["Steered"]


class Steered(Source):
    r"""The lineages of particles that `SMC` re-sampled on the way: approximately the posterior's, from the first iteration on.

    Their weights are exp(beta·r(x_0) - sum beta·dV) against the chain that chose them, and made equal by re-sampling at the end, so
    that what is drawn stands for p(x)·exp(beta·r(x)) / Z with an error of 1/particles. log p of each step is known; the density
    that a lineage was drawn with is not, so objectives with importance weights refuse.

    exp(log Z) of each group is unbiased, whatever the posterior of the moment is: `log_z_steered` of the metrics is the mean of
    log Z over prompts, low by half its variance, beside the loss's own `log_z` and the lower bound `elbo`.

    Args:
        share: Share of each prompt's group.
        particles: Chains that are drawn together for each prompt; a micro-batch holds them. They cost their network calls and, at
            each weighing, a call of the reward, whatever the share takes of them.
        threshold: See `SMC`; so are `every` and `temper`.
        every: Steps from one weighing to the next.
        temper: How little r counts of early estimates.
    """

    name = "steered"
    posterior_like = True
    density_unknown = "for chains chosen by their reward on the way. Take steered out"
    judges_estimates = True
    needs_noise = True

    def __init__(
        self,
        share: Share,
        particles: Annotated[int, Field(ge=2)] = 16,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
        every: PositiveInt = 1,
        temper: Annotated[float, Field(ge=0)] = 2.0,
    ) -> None:
        self.share = share
        self.method = SMC(particles, threshold, every, temper)
        self.drawn_together = particles

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; log_p is known, log_q is not."""
        n = self.method.particles
        needed = math.ceil(count / n)
        groups = [(row, nth, g) for row, nth in zip(rows, occurrences(rows), strict=True) for g in range(needed)]
        seeds = [seed_of(self.seed, "steered", iteration, *group) for group in groups]
        together = sampler.micro_batch // n
        parts = []
        for first in range(0, len(groups), together):
            here = slice(first, first + together)
            parts.append(self._drawn(sampler, [row for row, _, _ in groups[here]], seeds[here], beta))
        # The rows of a group come in random order, so that the first ones are as good as any.
        kept = torch.arange(len(groups) * n).unflatten(0, (len(rows), needed * n))[:, :count].flatten()
        return Batch.cat(parts)[kept]

    def _drawn(self, sampler: Sampler, rows: list[int], seeds: list[int], beta: float) -> Batch:
        known = [sampler.metadata[row] for row in rows]
        with sampler.stopwatch("rollout"):
            found = steered(
                sampler.prior, sampler.reward, self.method, sampler.texts(rows), seeds, beta, metadata=known
            )
        assert found.log_z is not None
        n, trajectory = self.method.particles, sampler.joined([found.trajectory.to("cpu")])
        prompt = torch.tensor(rows).repeat_interleave(n)
        log_p, norm_p = trajectory.log_prob, trajectory.output_norm
        log_z = found.log_z.repeat_interleave(n)
        return Batch(trajectory, prompt, found.reward.float(), log_p=log_p, norm_p=norm_p, log_z=log_z)
