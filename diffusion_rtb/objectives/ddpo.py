r"""DDPO: reward maximisation with clipped ratios per denoising step, without a KL.

    A = clip( (r - mean r) / std r, ±advantage_clip ),     mean and std over the trajectories of a prompt, or of the batch
    loss = mean over trajectories of sum_t max( -A·rho_t, -A·clip(rho_t, 1 - clip_range, 1 + clip_range) )

    rho_t = exp(log_q - log_behaviour) of one transition, 1 at the first update on a batch

It maximises E_q[r] and nothing holds it to the prior: its optimum is the best image, not the posterior, and only stopping early
keeps diversity. beta plays no part but in the residuals that are logged and in what counts as equal rewards.

Here the terms are *summed* over steps and log-densities are summed over dimensions, so that the gradient at rho = 1 is that of
E[A·log_q]. The published code averages log-densities over the D dimensions and clips at 1e-4; on sums that is 1e-4·D.

Source: Black, Janner, Du, Kostrikov, Levine 2023, https://arxiv.org/abs/2305.13301.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_clip_range, check_policy_terms, check_positive
from diffusion_rtb.objectives._groups import STD_FLOOR, group_baseline, group_std
from diffusion_rtb.objectives._policy import PolicyGradient, behaviour, clipped_loss, report

__all__ = ["DDPO"]

NORMALISE = ("prompt", "batch")


class DDPO(PolicyGradient):
    """Clipped policy gradient of E_q[r], an `Objective` that goes to the highest reward and not to the posterior.

    Args:
        clip_range: how far the ratio of one step may leave 1 before it gets no gradient.
        normalise: mean and standard deviation of rewards over each "prompt" or over the whole "batch".
        advantage_clip: largest advantage; standard deviations.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    clips_ratios = True

    def __init__(
        self,
        clip_range: float = 0.2,
        *,
        normalise: Literal["prompt", "batch"] = "prompt",
        advantage_clip: float = 5.0,
    ) -> None:
        super().__init__()
        self.clip_range = check_clip_range(clip_range)
        self.normalise = check_choice("normalise", normalise, NORMALISE)
        self.smallest_group = 2 if normalise == "prompt" else 1
        self.advantage_clip = check_positive("advantage_clip", advantage_clip)

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch; `beta` is read for the logged residuals and the floor of the standard deviation.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory
                normalised per prompt.
        """
        check_policy_terms(terms, beta)
        advantage = self.advantage(terms, beta)[:, None]
        loss = clipped_loss(terms.log_q, behaviour(terms), advantage, self.clip_range).mean()
        return report(loss, terms, beta)

    def advantage(self, terms: Terms, beta: float) -> Float[Tensor, " batch"]:
        """Normalised and clipped reward; standard deviations."""
        reward = terms.reward
        if self.normalise == "prompt":
            scaled = (reward - group_baseline(reward, terms.prompt)) / group_std(reward, terms.prompt, beta)
        else:
            scaled = (reward - reward.mean()) / (reward.std(correction=0) + STD_FLOOR / beta)
        return torch.clamp(scaled, -self.advantage_clip, self.advantage_clip)
