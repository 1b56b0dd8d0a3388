r"""RAM, and its annealed form, tilt matching: the prior's denoiser plus the covariance of x_0 with the reward.

    R = beta·(r(x_0) - mean of the prompt's other samples)
    RAM              aim = mean_p + R·(mean_0 - mean_q)                  x_0 from the posterior as it is
    tilt matching    aim = mean_old + R·(mean_0 - mean_old)/stages       x_0 from the old posterior, that of the stage before

with x_t noised from x_0 and mean_0 the mean by a network that knows x_0. Let q_a be p·exp(a·beta·r) / Z_a, on the way to the
posterior q_1. Its denoiser moves by d/da E_a[mean_0 | x_t] = Cov_a(beta·r, mean_0 | x_t), so that the posterior's is

    mean_p + integral of Cov_a(beta·r, mean_0 | x_t) over a from 0 to 1

RAM's fixed point has Cov_1 in the place of the integral. **It is the posterior where that covariance does not change on the
way**, as with a linear reward and normal x_0 given x_t. Elsewhere it is biased: for r = -c·x²/2, x_0 given x_t normal of variance
v under p and u = beta·c·v, what pulls at the posterior's own x0_hat is not 0 but (u / (1 + u))² of the prior's x0_hat, outwards.
Tilt matching takes the integral in `stages`, each by the covariance at its beginning. The error of a stage falls as 1/stages² and
that of all as 1/stages, if each is fitted to its end: `length` iterations for each.

**Where RAM is stable.** mean_q is in its own aim: x0_hat goes back to its fixed point where 1 + E[R | x_t] is positive, and away
from it, growing without bound, where samples lie more than a nat below the mean of their prompt. So R is raised by one number for
all samples of a prompt that has any below -1/2, until none is. The fixed point stays the same, as E[mean_0 - mean_q | x_t] is 0
there, but with a reward that spreads over many nats RAM becomes the denoising of its own samples, held by the prior with little
weight: it drifts by what the chain's steps are too long for. Tilt matching has no such loop.

There is no log Z and no weight that could overflow. One call of the reference and one of the posterior per state.

Sources: RAM, 2026, https://arxiv.org/abs/2605.10759; tilt matching, 2025, https://arxiv.org/abs/2512.21829
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Samples, States
from diffusion_rtb.objectives._aiming import Aiming, checked, target
from diffusion_rtb.objectives._groups import group_baseline, same_prompt

__all__ = ["RAM"]

LOWEST = -0.5
"""R of RAM at least, nats; above -1, where its fixed point stops drawing near."""


class RAM(Aiming):
    """Match the prior's denoiser plus its covariance with the reward, at once or in stages; see the module.

    Args:
        stages: Of tilt matching; None: RAM.
        length: Iterations of a stage; None: RAM. After the last stage the posterior stays at its target.

    Raises:
        ValueError: one is below 1, or there without the other.
    """

    def __init__(self, stages: int | None = None, length: int | None = None) -> None:
        super().__init__()
        if (stages is None) != (length is None):
            raise ValueError(
                f"Tilt matching needs stages and the length of one, RAM neither; got stages={stages}, length={length}."
            )
        for name, number in (("stages", stages), ("length", length)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        self.stages, self.length = stages, length
        self.draws_old = stages is not None
        self.reference = "old" if self.draws_old else "prior"
        self.compares = (self.reference,)

    def check_iterations(self, iterations: int) -> None:
        """Refuse a run that ends before its last stage does; ValueError."""
        if self.stages is None or self.length is None or self.stages * self.length <= iterations:
            return
        needed = self.stages * self.length
        raise ValueError(
            f"{self.stages} stages of {self.length} iterations are {needed}, and train.iterations is {iterations}: the run would "
            f"end at a weaker posterior. Set length to {max(1, iterations // self.stages)}, or train for {needed}."
        )

    def keeps_old(self, iteration: int) -> float:
        """1 within a stage, 0 at its end, unless it is the last."""
        if self.stages is None or self.length is None:
            return 1.0
        stage, rest = divmod(iteration + 1, self.length)
        return 1.0 if rest or stage >= self.stages else 0.0

    def weights(self, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
        """R, by stage; nats."""
        reward = checked("ram", samples, beta)
        tilt = beta / (self.stages or 1) * (reward - group_baseline(reward, samples.prompt, "leave_one_out"))
        if self.stages is not None:
            return tilt
        member, _ = same_prompt(samples.prompt)
        lowest = torch.where(member, tilt, torch.inf).amin(1)
        return tilt + torch.where(member, (LOWEST - lowest).clamp(min=0)[:, None], 0).sum(0)

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """See the module."""
        mean_0, tilt = target(at)
        reference = at.means[self.reference]
        return reference + tilt * (mean_0 - (at.mean_q if self.stages is None else reference))
