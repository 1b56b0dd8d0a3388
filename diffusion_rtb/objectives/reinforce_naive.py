r"""The RL baseline of the original RTB paper, kept to show what it converges to.

    R = exp(beta·r)                                  the reward itself, not its logarithm
    loss = mean of [ -(R - mean R)·log_q + kl_weight·(log_q - log_p)² ],   log_q and log_p of whole trajectories

Its fixed point. With L = log_q - log_p, E_q[grad L²] = E_q[2 L·grad log q] = 2·grad KL(q || p), and the first term is
-grad E_q[R]. So on-policy it minimises 2·kl_weight·KL(q || p) - E_q[R], and the minimiser is

    q ∝ p · exp( R / (2·kl_weight) ) = p · exp( exp(beta·r) / (2·kl_weight) )

which is p·exp(beta·r) for no kl_weight. On the 25-Gaussian problem with 9 modes kept, R = 25·weight there and 0 elsewhere, the
total variation to the true mode weights is 0.31 at kl_weight 1.0, 0.51 at 0.5, 0.69 at 0.3: either near the prior, or one mode.
That is why it looked untunable: a wrong target, no property of reinforcement learning. With log r as reward and the KL in the
reward (`reinforce_kl`) the target is right.

Sources: the baseline, Venkatraman et al. 2024, https://arxiv.org/abs/2405.20971; its correction, Deleu et al. 2025,
https://arxiv.org/abs/2509.01632.
"""

from __future__ import annotations

import torch

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_policy_terms, check_positive
from diffusion_rtb.objectives._groups import group_baseline
from diffusion_rtb.objectives._policy import PolicyGradient, report

__all__ = ["ReinforceNaive"]


class ReinforceNaive(PolicyGradient):
    """REINFORCE on exp(beta·r) with a squared log-ratio penalty, an `Objective` whose optimum is *not* the posterior.

    Args:
        kl_weight: of the squared log-ratio; in units of exp(beta·r).

    Raises:
        ValueError: kl_weight is not a positive finite number.
    """

    smallest_group = 2
    """Trajectories per prompt that the baseline needs."""

    def __init__(self, kl_weight: float = 0.5) -> None:
        super().__init__()
        self.kl_weight = check_positive("kl_weight", kl_weight)

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch; its residual is that of the posterior it does not go to.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory,
                exp(beta·r) that overflows.
        """
        check_policy_terms(terms, beta)
        reward = torch.exp(beta * terms.reward)
        if not bool(torch.isfinite(reward).all()):
            raise ValueError(
                f"exp(beta·r) overflows at beta·r = {float((beta * terms.reward).max()):.4g}: reinforce_naive takes the reward "
                "out of the logarithm. Lower beta, or use reinforce_kl or rtb."
            )
        advantage = reward - group_baseline(reward, terms.prompt)
        penalty = (terms.log_q - terms.log_p).sum(dim=1).square()
        loss = torch.mean(-advantage * terms.log_q.sum(dim=1) + self.kl_weight * penalty)
        return report(loss, terms, beta)
