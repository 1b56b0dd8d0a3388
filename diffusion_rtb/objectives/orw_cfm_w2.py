r"""Online reward-weighted flow matching with a Wasserstein term (ORW-CFM-W2): `reward_weighted` in rounds, held to the prior.

    x_0 ~ q_old,  w = exp(beta·r(x_0)) / mean of the prompt's samples
    loss = w·|mean_q(x_t) - mean_0|² / (2·std²) + w2·|mean_q(x_t) - mean_p(x_t)|² / (2·std²)

The second term, the squared distance of the two velocities, bounds that of the two distributions (W2², up to a constant). Without
it, w2 0, the rounds run away to the sample of the highest reward. With it they come to rest, but where is no matter of beta alone:
w2 is a strength of its own, which the weights of every round stand against. Choose it by the KL or the reward that comes out. The
one exact use is one round without it, `reward_weighted`.

As published, up to: transitions of any chain and any prediction instead of the velocity of a flow (at each t the same loss up to a
factor, for both terms); weights normalised within a prompt, so that w2 stands against a mean weight of 1; noise drawn for each
sample without pairing by optimal transport.

Source: Fan et al. 2025, https://arxiv.org/abs/2502.06061
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import States
from diffusion_rtb.objectives.reward_weighted import RewardWeighted

__all__ = ["OrwCfmW2"]


class OrwCfmW2(RewardWeighted):
    """Denoise weighted samples of the older posterior, and stay with the prior; see the module.

    Args:
        w2: Weight of the second term, beside a mean weight of 1 on the first; 0: none.
        refresh: Iterations of a round; None: one round.

    Raises:
        ValueError: w2 is negative, or refresh below 1.
    """

    def __init__(self, w2: float = 1.0, refresh: int | None = 1) -> None:
        super().__init__(refresh)
        if not 0 <= w2 < float("inf"):
            raise ValueError(f"w2 is a weight, 0 or more; got {w2}.")
        self.w2 = w2
        self.compares = ("prior",) if w2 else ()

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """mean_q, pulled by the gradients of both terms."""
        pulled = super().aim(at, beta)
        return pulled - self.w2 * (at.mean_q - at.means["prior"]) if self.w2 else pulled
