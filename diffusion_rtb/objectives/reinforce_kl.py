r"""REINFORCE with the KL to the prior inside the reward.

    maximise  E_q[r] - alpha·KL(q || p),   alpha = 1/beta,   whose maximiser is the posterior p(x)·exp(beta·r(x)) / Z

    A = r - alpha · sum_t (log_q - log_p),    detached: the KL is part of the reward
    loss = - mean over trajectories of w · (A - baseline) · sum_t log_q

On-policy, w = 1, this is RTB: beta·(A - mean A) is minus the residual under VarGrad's log Z, and beta times this gradient
is VarGrad's, number for number. Trajectories of another chain b need an importance weight, as an expectation over q is meant:

    exact             w = q(trajectory) / b(trajectory)                    unbiased; its variance grows with the length
    self_normalised   w ∝ q / b, summing to the group's size               biased by O(1/n) in groups of n
    tempered          w ∝ (q / b)^(1/T), T steps, summing alike            biased; what the Trust-PCL paper's code does

The baseline estimates E_q[A], so exact and self_normalised weigh it too: the plain mean over prior trajectories, say, is far above
what q's own reach once q has moved, and all the gradient would be noise. (tempered has the plain one, like that code.) With
exact weights the baseline has to be leave_one_out to stay unbiased; the mean counts the trajectory itself, a bias of O(1/n).

Without weights the same formula on anyone's trajectories is no policy gradient, but it is the gradient of RTB's squared residual,
which needs none: use `rtb` there. The equivalence was shown by Deleu, Nouri, Bengio, Precup 2025,
https://arxiv.org/abs/2509.01632; REINFORCE is Williams 1992, doi 10.1007/BF00992696; the leave-one-out baseline Kool et al. 2019,
https://openreview.net/forum?id=r1lgTGL5DE.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_policy_terms
from diffusion_rtb.objectives._groups import Baseline, group_baseline, same_prompt
from diffusion_rtb.objectives._policy import PolicyGradient

__all__ = ["ReinforceKL"]

Importance = Literal["none", "exact", "self_normalised", "tempered"]


class ReinforceKL(PolicyGradient):
    """KL-regularised REINFORCE, an `Objective`.

    Args:
        baseline: what A is compared with: the "mean" of its prompt's trajectories, or of the others ("leave_one_out").
        importance: weights of trajectories that another chain drew: "none" (on-policy only), "exact", "self_normalised" or
            "tempered".

    Raises:
        ValueError: an argument is none of those allowed.
    """

    smallest_group = 2
    """Trajectories per prompt that the baseline needs."""

    def __init__(self, baseline: Baseline = "leave_one_out", importance: Importance = "none") -> None:
        super().__init__()
        check_choice("baseline", baseline, get_args(Baseline))
        check_choice("importance", importance, get_args(Importance))
        self.baseline: Baseline = baseline
        self.importance: Importance = importance
        self.on_policy_only = importance == "none"
        self.importance_weighted = importance != "none"

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch, in reward units; `beta` in nats per unit of reward.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory,
                importance weights that overflow or have no density to be taken against.
        """
        check_policy_terms(terms, beta)
        value = log_weight(terms.log_q, terms.log_p, terms.reward, beta).detach() / beta
        baseline = self.baseline_of(value, terms)
        loss = -torch.mean(self.weights(terms) * (value - baseline) * terms.log_q.sum(dim=1))
        return Loss(loss, (baseline - value) * beta, baseline * beta, to_nats=beta)

    def baseline_of(self, value: Float[Tensor, " batch"], terms: Terms) -> Float[Tensor, " batch"]:
        """What each trajectory's A is compared with: an estimate of E_q[A]; reward units."""
        plain = group_baseline(value, terms.prompt, self.baseline)
        if self.importance in ("none", "tempered"):
            return plain
        counted = terms.prompt[:, None] == terms.prompt[None, :]
        if self.baseline == "leave_one_out":
            counted.fill_diagonal_(False)
        # Shares of the counted trajectories, not sums less one: the largest weight may be all of a sum.
        return torch.softmax(torch.where(counted, self.log_weights(terms), -torch.inf), dim=1) @ value

    def log_weights(self, terms: Terms) -> Float[Tensor, " batch"]:
        """log w before normalisation, detached; nats. ValueError where the density under the drawing chain is unknown."""
        if terms.log_behaviour is None:
            raise ValueError(
                f'importance="{self.importance}" needs the log-density of the chain that drew the trajectories '
                '(Terms.log_behaviour), which is unknown. Use importance="none" on-policy, or rtb.'
            )
        log_w = (terms.log_q.detach() - terms.log_behaviour).sum(dim=1)
        return log_w / terms.log_q.shape[1] if self.importance == "tempered" else log_w

    def weights(self, terms: Terms) -> Float[Tensor, " batch"]:
        """The importance weight of each trajectory, detached; 1 on average.

        Raises:
            ValueError: the density under the drawing chain is unknown, or an exact weight overflows.
        """
        if self.importance == "none":
            return torch.ones_like(terms.reward)
        log_w = self.log_weights(terms)
        if self.importance == "exact":
            weights = log_w.exp()
            if not bool(torch.isfinite(weights).all()):
                raise ValueError(
                    f"exact importance weights overflow: one trajectory is exp({float(log_w.max()):.4g}) times likelier under "
                    'the posterior than under the chain that drew it. Use importance="self_normalised", or rtb, which needs none.'
                )
            return weights
        member, _ = same_prompt(terms.prompt)
        share = torch.softmax(torch.where(member, log_w, -torch.inf), dim=1)
        return (share * member.sum(dim=1, keepdim=True)).sum(dim=0)
