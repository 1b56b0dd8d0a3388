r"""Direct preference optimisation (DPO): pairs of one prompt's trajectories, the prior always the reference.

    l = log q - log p of a trajectory           z_ij = slope·(l_i - l_j)         the odds that q gives i over j
    loss = mean over pairs of -y_ij log sigma(z_ij) - (1 - y_ij) log sigma(-z_ij)

    labels: soft     y_ij = sigma(slope·beta·(r_i - r_j))
    labels: hard     y_ij = 1 where r_i > r_j, 0 where r_i < r_j, 1/2 where they are equal

**Soft labels have the posterior as minimiser, on anyone's pairs.** The cross-entropy is strictly convex in z_ij and least where
sigma(z_ij) = y_ij, that is l_i - l_j = beta·(r_i - r_j). If that is so of every pair, l - beta·r is one number for all
trajectories, and as q sums to 1 that number is -log Z: q = p·exp(beta·r) / Z. It is attained, so no other q is a minimiser where
pairs cover all trajectories. Which pairs are chosen may depend on rewards (`pairs: best_worst`): the condition is the same for
each.
There is no log Z to learn, and a pair's slope is bounded by `slope`, where VarGrad's grows with the residual; for a
small `slope` 4/slope² times its gradient is 2n/(n - 1) times VarGrad's.

**Hard labels have no strength.** They know the order of rewards alone: any larger l_w - l_l costs less, and q goes on past each
posterior for as long as it is trained; beta plays no part. Labels that people drew by the Bradley–Terry law sigma(r_w - r_l)
would have p·exp(r / slope) as minimiser, which is how `slope` is the beta of the DPO paper.

With `ratios: step` each step has a pair term of its own, summed (D3PO), its two states those of different trajectories. Each step
is asked for the whole difference then: no posterior of any beta is its minimum. `clip_range` bounds its ratios q / p.

Sources: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; D3PO, Yang et al. 2023, https://arxiv.org/abs/2311.13231; the prior
as reference in all rounds, Xiong et al. 2023, https://arxiv.org/abs/2312.11456.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_clip_range, check_positive, check_terms
from diffusion_rtb.objectives._groups import check_groups
from diffusion_rtb.objectives._policy import report
from diffusion_rtb.objectives._preferences import Labels, Pairs, labelled, paired

__all__ = ["DPO"]


class DPO(nn.Module):
    """Cross-entropy of preferences between trajectories of one prompt, an `Objective`.

    Args:
        labels: "soft", whose minimiser is the posterior, or "hard", the order of rewards alone.
        pairs: "all" of a group, n(n - 1)/2, or its "best_worst" one.
        ratios: "trajectory", log q - log p of whole trajectories, or "step", one pair term for each step.
        slope: of z in l, the beta of the DPO paper; 1/nats. Soft labels have the same minimiser for each; where
            slope·beta·(r_i - r_j) of most pairs is far beyond 1 they saturate, and learn slowly.
        clip_range: of q / p of a step, for `ratios: step`: beyond 1 ± clip_range it gets no gradient; None: unbounded.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    smallest_group = 2

    def __init__(
        self,
        labels: Labels = "soft",
        pairs: Pairs = "all",
        *,
        ratios: Literal["trajectory", "step"] = "trajectory",
        slope: float = 1.0,
        clip_range: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("labels", labels, ("soft", "hard"))
        check_choice("pairs", pairs, ("all", "best_worst"))
        self.labels: Labels = labels
        self.pairs: Pairs = pairs
        self.ratios = check_choice("ratios", ratios, ("trajectory", "step"))
        self.slope = check_positive("slope", slope)
        if clip_range is not None and ratios == "trajectory":
            raise ValueError(
                f"clip_range={clip_range} bounds ratios of single steps; those of whole trajectories stay as they are. "
                'Remove it, or set ratios="step".'
            )
        self.clip_range = None if clip_range is None else check_clip_range(clip_range)

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch; `beta` in nats per unit of reward; `residual` and `log_z` are VarGrad's.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory.
        """
        check_terms(terms, beta)
        check_groups("dpo", terms.prompt)
        first, second, weight = paired(self.pairs, terms.prompt, terms.reward)
        log_ratio = self.log_ratio(terms)
        odds = self.slope * (log_ratio[first] - log_ratio[second])
        label = labelled(self.labels, self.slope * beta * (terms.reward[first] - terms.reward[second]))
        cost = binary_cross_entropy_with_logits(odds, label[:, None].expand_as(odds), reduction="none").sum(dim=1)
        return report((weight.to(cost) * cost).sum(), terms, beta)

    def log_ratio(self, terms: Terms) -> Float[Tensor, "batch terms"]:
        """log q - log p, of whole trajectories (batch, 1) or of each step; nats."""
        steps = terms.log_q - terms.log_p
        if self.ratios == "trajectory":
            return steps.sum(dim=1, keepdim=True)
        if self.clip_range is None:
            return steps
        return steps.clamp(math.log1p(-self.clip_range), math.log1p(self.clip_range))
