r"""Direct preference optimisation of noised states (Diffusion-DPO): no trajectories, and the prior always the reference.

    x_t: x_0 noised, samples of one prompt with the same t and the same noise
    e = |mean(x_t) - mean_0|² / (2·std²)                  a step's share of the ELBO; mean_0: the step of a network that knows x_0
    l = T·(e_p - e_q)                                     from one of T steps, an estimate of log q(x_0) - log p(x_0) by both ELBOs
    z_ij = slope·(l_i - l_j)
    loss = mean over steps and pairs of -y_ij log sigma(z_ij) - (1 - y_ij) log sigma(-z_ij)

    labels: hard     y_ij = 1 where r_i > r_j, 0 where r_i < r_j, 1/2 where they are equal                          the paper's
    labels: soft     y_ij = sigma(slope·beta·(r_i - r_j))

The mean over steps is outside of log sigma: an upper bound of the loss of the whole difference (Jensen), as in the paper. So soft
labels do not make it exact, as they do in `dpo`: l spreads over T times the nats of a step, each step is asked for the whole
difference at once, and where it cannot be had sigma(z) saturates. Small slopes spread z less: for slope -> 0 the bound is tight,
4/slope² times the loss a regression of l_i - l_j on beta·(r_i - r_j), whose noise of l alone stays.

The paper's beta, 2000 to 5000, multiplies means of squares over D dimensions: it is slope·T·D here, but for the weights, which are
those of the ELBO here and 1 there. Hard labels have no strength, as in `dpo`.

Samples may be anyone's. It is written as an aim, whose pull is the gradient of the loss; what is logged as `loss` is half the
squared length of the pull.

Source: Wallace et al. 2023, https://arxiv.org/abs/2311.12908
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import States
from diffusion_rtb.objectives._aiming import Aiming
from diffusion_rtb.objectives._checks import check_beta, check_choice, check_positive
from diffusion_rtb.objectives._groups import check_groups
from diffusion_rtb.objectives._preferences import Labels, Pairs, labelled, paired

__all__ = ["DiffusionDPO"]


class DiffusionDPO(Aiming):
    """Preferences between noised samples of one prompt; see the module.

    Args:
        labels: "hard", the order of rewards alone, or "soft".
        pairs: "all" of the samples of a prompt in a micro-batch, or its "best_worst" one.
        slope: Of z in l; 1/nats.
        own: Learn from the posterior's own samples too; false: from those of behaviours alone, such as pairs from a folder.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    on_policy_only = False
    pairs_states = True

    def __init__(self, labels: Labels = "hard", pairs: Pairs = "all", *, slope: float = 1.0, own: bool = True) -> None:
        super().__init__()
        self.labels: Labels = labels
        self.pairs: Pairs = pairs
        check_choice("labels", labels, ("soft", "hard"))
        check_choice("pairs", pairs, ("all", "best_worst"))
        self.slope = check_positive("slope", slope)
        self.reads_order, self.leaves_own = labels == "hard", not own

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """mean_q, pulled by the gradient of the loss; see the module."""
        check_beta(beta)
        check_groups("diffusion_dpo", at.prompt)
        assert at.mean_0 is not None
        errors = [(mean - at.mean_0).double() / at.std for mean in (at.means["prior"], at.mean_q)]
        e_p, e_q = (0.5 * error.square().flatten(1).sum(1) for error in errors)
        log_ratio, reward = at.dense * (e_p - e_q), at.reward.double()
        first, second, weight = paired(self.pairs, at.prompt, reward)
        odds = self.slope * (log_ratio[first] - log_ratio[second])
        label = labelled(self.labels, self.slope * beta * (reward[first] - reward[second]))
        pull = weight * (torch.sigmoid(odds) - label) * len(reward) * self.slope  # d loss / d l_i of each pair's first
        slope = torch.zeros_like(reward).index_add(0, first, pull).index_add(0, second, -pull)
        # d l / d mean_q = -dense·(mean_q - mean_0) / std², and the engine sums over steps what is a mean over them.
        towards = slope.reshape(-1, *[1] * (at.mean_q.ndim - 1)).to(at.mean_q)
        return at.mean_q + towards * (at.mean_q - at.mean_0)
