r"""The reward's own gradient, back through the last K steps of the chain, with the path's KL to the prior as penalty.

    x_s = mean_q(x_t) + std·z, z ~ N(0, I)                                        the chain, as a function of its noise
    KL_t = |mean_q(x_t) - mean_p(x_t)|² / (2·std²)
    loss = mean over trajectories of -beta·r(x_0) + sum over the last K steps of KL_t                       nats

The gradient goes through r, the prior's decoder and K steps of the network, x_{T-K} held fixed. It has far less noise than one
of rewards alone, and asks for a reward that has a gradient.

**K = T** (`last_steps: null`): the expectation of the loss is KL(q || p·exp(beta·r)/Z) of whole trajectories, less log Z. Its
optimum is the posterior's chain, the nearest one in this divergence where q cannot be that (steps of fixed deviation).

**K < T is another objective.** Each of the last K steps learns what is best from where it starts, the others learn nothing of
their own: with numbers of its own for every step, q would be the prior down to x_{T-K} and the posterior's chain from there on, and
its x_0 not the posterior. What steps share carries the change to the earlier ones too, where nothing weighs it: their KL is in no
loss. So K < T is biased, the more the smaller K, and cheaper. `random: true` draws K anew for every update, evenly from
1 to `last_steps`: all those steps learn, the last ones most; the mixture of K's has no single objective.

A step without noise is passed through and learns nothing, as there is no KL that it would pay.

Sources: DRaFT, Clark et al. 2023, https://arxiv.org/abs/2309.17400, without a KL; random K: AlignProp, Prabhudesai et al. 2023,
https://arxiv.org/abs/2310.03739; with the KL: Uehara et al. 2024, https://arxiv.org/abs/2402.15194.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_terms
from diffusion_rtb.objectives._policy import report

__all__ = ["RewardBackprop"]


class RewardBackprop:
    """Follow the reward's gradient through the last steps; see the module.

    Args:
        last_steps: K; None: all steps.
        random: Draw K for every update, evenly from 1 to `last_steps`.

    Raises:
        ValueError: `last_steps` is below 1.
    """

    on_policy_only = True
    needs_gradient = True

    def __init__(self, last_steps: int | None = None, *, random: bool = False) -> None:
        if last_steps is not None and last_steps < 1:
            raise ValueError(f"last_steps must be at least 1, or null for all steps; got {last_steps}.")
        self.last_steps, self.random = last_steps, random

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def check_steps(self, steps: int) -> None:
        """ValueError: the chain is shorter than `last_steps`."""
        if self.last_steps is not None and self.last_steps > steps:
            raise ValueError(
                f"last_steps is {self.last_steps} and the chain has {steps} steps: give {steps} or fewer, or null for all."
            )

    def last(self, steps: int, generator: torch.Generator) -> int:
        """K of an update."""
        self.check_steps(steps)
        most = steps if self.last_steps is None else self.last_steps
        return int(torch.randint(1, most + 1, (), generator=generator)) if self.random else most

    def __call__(self, terms: Terms, beta: float) -> Loss:
        """What is said of the posterior's own trajectories, for the log; nothing is learned from it. See `report`."""
        check_terms(terms, beta)
        return report(torch.zeros((), device=terms.reward.device), terms, beta)
