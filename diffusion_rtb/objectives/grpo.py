r"""GRPO: group-normalised advantages, clipped ratios per denoising step, a KL to the prior.

    A = (r - m(r)) / s - c·(K - m(K))        K: the estimate of the KL where it is placed in the reward, detached
    loss = mean over trajectories of sum_t max(-A·rho_t, -A·clip(rho_t)) + c·K'       K': the one placed in the loss

    m = mean of the others in the group;   s = std of r in the group, or 1;   c = alpha / s, alpha = 1/beta
    rho_t = exp(log_q - log_behaviour) of one transition

Published GRPO divides the reward by s and weighs the KL by a constant, so that its temperature is c·s and changes as the rewards
of a group come closer: it has no fixed target. Here both are divided by s, which only rescales the gradient of a prompt, and
the target stays p(x)·exp(beta·r(x)) / Z for an estimator whose gradient is right (`kl_estimators`: k1_reward, gaussian,
path_k2_loss). `kl_weight` gives the published form. Its mean counts the trajectory itself, which makes the advantages, and
not the KL in the loss, (n - 1)/n times smaller in groups of n: another way for the temperature to move, hence the others' mean
here. With s = std a shift of order 1/n is left, as s is drawn with the rewards it divides.

The published KL is k3 in the loss, on flow models the closed form in the loss. The default here is k1 in the reward: it has the
right gradient and costs no network evaluation. k3's pull towards the prior comes from rare samples, of the order of one in
exp(KL) of a step, so that a posterior many nats away per step is not pulled at all.

Sources: GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300; s = 1, Liu et al. 2025, https://arxiv.org/abs/2503.20783; on
flow models, Liu et al. 2025, https://arxiv.org/abs/2505.05470.
"""

from __future__ import annotations

from typing import Literal

import torch

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_clip_range, check_policy_terms, check_positive
from diffusion_rtb.objectives._groups import group_baseline, group_std
from diffusion_rtb.objectives._kl_estimators import KlEstimator, KlOption
from diffusion_rtb.objectives._policy import PolicyGradient, behaviour, clipped_loss, report

__all__ = ["GRPO"]

NORMALISE = ("std", "none")


class GRPO(PolicyGradient):
    """Group-relative policy optimisation with a KL to the prior, an `Objective`.

    Args:
        kl: the estimate of KL(q || p) and its place, see `kl_estimators`; "none" for reward maximisation.
        normalise: divide by the standard deviation of each group's rewards ("std"), or not ("none").
        clip_range: how far the ratio of one step may leave 1 before it gets no gradient; ratios of densities summed over dims.
        kl_weight: c as a constant, as published; None for alpha / s, with which the target does not move.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    clips_ratios = True
    smallest_group = 2
    """Trajectories per prompt that the baseline needs."""

    def __init__(
        self,
        kl: KlOption = "k1_reward",
        *,
        normalise: Literal["std", "none"] = "std",
        clip_range: float = 0.2,
        kl_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.kl = KlEstimator(kl)
        self.uses_kl = self.kl.uses_kl
        self.normalise = check_choice("normalise", normalise, NORMALISE)
        self.clip_range = check_clip_range(clip_range)
        self.kl_weight = None if kl_weight is None else check_positive("kl_weight", kl_weight)
        if kl == "none" and kl_weight is not None:
            raise ValueError(f'kl_weight={kl_weight} has no KL to weigh: kl is "none". Remove it, or choose a kl.')

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch; `beta` in nats per unit of reward.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory, a
                closed-form KL that is asked for and not there.
        """
        check_policy_terms(terms, beta, uses_kl=self.uses_kl)
        reward, prompt = terms.reward, terms.prompt
        scale = group_std(reward, prompt, beta) if self.normalise == "std" else torch.ones_like(reward)
        weight = 1 / (beta * scale) if self.kl_weight is None else torch.full_like(reward, self.kl_weight)
        paid = self.kl.in_reward(terms)
        above = reward - group_baseline(reward, prompt, "leave_one_out")
        paid_above = paid - group_baseline(paid, prompt, "leave_one_out")
        advantage = above / scale - weight * paid_above
        policy = clipped_loss(terms.log_q, behaviour(terms), advantage[:, None], self.clip_range)
        to_nats = 1.0 if self.normalise == "std" else beta
        return report(torch.mean(policy + weight * self.kl.in_loss(terms)), terms, beta, to_nats)
