"""The forward process run backwards in the steps of a chain: what a transition is where the sampler's own has no noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.forward_process import Forward, denoised, transition
from diffusion_rtb.chain.recordable import solver_order
from diffusion_rtb.chain.trajectory import Trajectory

__all__ = ["Reversal"]


@dataclass(frozen=True, eq=False)
class Reversal:
    r"""x_t -> x_s of E[x_s | x_t, x_0] with x0_hat for x_0, and with its deviation: DDIM's step of eta 1, for any sampler's levels.

        x_t = k·x_s + sqrt(c²)·noise,   k = a_t/a_s,   c² = b_t² - k²·b_s²                        the forward process
        mean = (k·b_s²·x_t + a_s·c²·x0_hat) / b_t²,    std² = b_s²·c² / b_t²
        |mean_q - mean_0|² / (2·std²) = (a_s²/b_s² - a_t²/b_t²)·|x0_hat - x_0|² / 2

    The last line, summed over the steps, is the loss of the lower bound on log q(x_0). x_0 itself has no noise that a deviation
    could be of: the last step counts as one to x_0 + b_t/2·noise. A step between equal levels (solvers that look twice) has
    std 0 and is left out. Network answers are read as they are: nothing is clipped, and no earlier answer is combined with them.

    Sources: equation 7 of Song et al. 2020, https://arxiv.org/abs/2010.02502; the weights, Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630
    """

    forward: Forward
    std: Float[Tensor, " steps"]
    _following: Sequence[tuple[float, float]]
    """(a_s, b_s) of each step."""

    @staticmethod
    def of(scheduler: Any, timesteps: Float[Tensor, " steps"]) -> Reversal:
        """That of a scheduler's schedule.

        Raises:
            ValueError: it has no forward process, what its network predicts is not known, or its `add_noise` answers another level
                than that of the timestep which the network is told.
        """
        forward = Forward.of(scheduler, timesteps)
        _check_levels(scheduler, forward, timesteps)
        following = [*forward.levels[1:], (1.0, forward.levels[-1][1] / 2)]
        std = []
        for (a_t, b_t), s in zip(forward.levels, following, strict=True):
            _, own = transition(scheduler, s, (a_t, b_t))
            std.append(s[1] * own / b_t)
        return Reversal(forward, torch.tensor(std, dtype=timesteps.dtype), following)

    @staticmethod
    def where_needed(scheduler: Any, chain: Trajectory) -> Reversal | None:
        """The one in whose steps a chain's states are learned from; None where its own have noise and stand each for itself."""
        if chain.has_density and solver_order(scheduler) == 1:
            return None
        return Reversal.of(scheduler, chain.timesteps)

    @staticmethod
    def check(scheduler: Any) -> None:
        """`of` for a schedule of a few steps, whatever the scheduler's own is; ValueError: see there."""
        trial = copy.deepcopy(scheduler)
        few = min(10, int(trial.config.num_train_timesteps) - 1)
        trial.set_timesteps(few, **({"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}))
        Reversal.of(trial, trial.timesteps.float())

    def mean(
        self, step: int, x_t: Float[Tensor, "batch *dims"], output: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        """Mean of x_s by what the network answered at x_t; differentiable."""
        (a_t, b_t), (a_s, b_s) = self.forward.levels[step], self._following[step]
        k = a_t / a_s
        x_0 = denoised(self.forward.predicts, x_t, output, a_t, b_t)
        return (k * b_s**2 * x_t + a_s * (b_t**2 - (k * b_s) ** 2) * x_0) / b_t**2


ROUNDING = 0.05
"""Of log(b/a) between whole timesteps."""


def _check_levels(scheduler: Any, forward: Forward, timesteps: Float[Tensor, " steps"]) -> None:
    """Solvers whose states between two timesteps are at a level of their own noise others for them."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or forward.predicts == "velocity":
        return
    known = (0.5 * torch.log((1 - alphas.double()) / alphas)).cpu()
    for t, (a, b) in zip(timesteps.tolist(), forward.levels, strict=True):
        low, share = int(t), t - int(t)
        level = float(known[low].lerp(known[min(low + 1, len(known) - 1)], share))
        if a > 0 and abs(math.log(b / a) - level) > ROUNDING:
            raise ValueError(
                f"{type(scheduler).__name__} takes steps between the noise levels of its timesteps and noises samples to others: "
                f"at timestep {t:g} b/a is {math.exp(level):.3g}, and add_noise makes it {b / a:.3g}. To learn from noised samples "
                "take HeunDiscreteScheduler, DPMSolverMultistepScheduler or DDIMScheduler."
            )
