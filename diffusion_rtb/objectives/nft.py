r"""DiffusionNFT: denoise good samples and undo the denoising of bad ones, as published; a baseline without a posterior.

    A = (r - mean) / std of the prompt's samples,    rho = 1/2 + clip(A, -a_max, a_max) / (2·a_max)
    mean_+ = b·mean_q + (1 - b)·mean_old,            mean_- = (1 + b)·mean_old - b·mean_q
    loss = a_max/b·[rho·|mean_+ - mean_0|²/s_+ + (1 - rho)·|mean_- - mean_0|²/s_-] / (2·std²)  +  kl·|mean_q - mean_p|² / (2·std²)

x_0 are samples of the old posterior, x_t their noised states, mean_0 the mean by a network that knows x_0, and s_± the detached
mean over dimensions of |mean_± - mean_0| / std. The old posterior is a moving average of the posterior: after iteration i
min(decay·i, decay_max) of it stays.

**No posterior is its minimum.** rho is a rank of sorts: beta plays no part, b is the length of a step, and as the old posterior
follows, each iteration improves on the last one, until the best sample is all that is drawn or the `kl` term holds it. Watch the
achieved strength, and stop early.

As published, up to: any chain and any prediction, not only the velocity of a flow (at each t the same loss up to a factor, by
term); sums over dimensions in |.|², so that `kl` is in nats, beside a first term that s_± has made one of lengths.

Source: Zheng et al. 2025, https://arxiv.org/abs/2509.16117
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Samples, States
from diffusion_rtb.objectives._aiming import Aiming, checked, target
from diffusion_rtb.objectives._checks import check_positive
from diffusion_rtb.objectives._groups import group_baseline, group_std

__all__ = ["NFT"]

SMALLEST = 1e-5
"""Of s, as published: a sample that is met exactly has no direction."""


class NFT(Aiming):
    """Pull towards good samples and away from bad ones, relative to a moving average of the posterior; see the module.

    Args:
        b: Length of the step that mean_± take from mean_old.
        a_max: Standard deviations of the reward at which rho is 0 or 1.
        kl: Weight of the distance to the prior; 0: none.
        decay: Growth per iteration of what stays of the old posterior.
        decay_max: Its most.

    Raises:
        ValueError: an argument is out of range.
    """

    draws_old = True

    def __init__(
        self, b: float = 1.0, *, a_max: float = 5.0, kl: float = 1e-4, decay: float = 1e-3, decay_max: float = 0.5
    ) -> None:
        super().__init__()
        self.b, self.a_max = check_positive("b", b), check_positive("a_max", a_max)
        if not 0 <= kl < math.inf:
            raise ValueError(f"kl is a weight, 0 or more; got {kl}.")
        for name, share in (("decay", decay), ("decay_max", decay_max)):
            if not 0 <= share < 1:
                raise ValueError(
                    f"{name} is a share of the old posterior that stays, 0 or more and below 1; got {share}."
                )
        self.kl, self.decay, self.decay_max = kl, decay, decay_max
        self.compares = ("old", "prior") if kl else ("old",)

    def keeps_old(self, iteration: int) -> float:
        """min(decay·i, decay_max)."""
        return min(self.decay * iteration, self.decay_max)

    def weights(self, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
        """rho."""
        reward = checked("nft", samples, beta)
        advantage = (reward - group_baseline(reward, samples.prompt)) / group_std(reward, samples.prompt, beta)
        return 0.5 + advantage.clamp(-self.a_max, self.a_max) / (2 * self.a_max)

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """mean_q, pulled by the gradient of the loss."""
        mean_0, rho = target(at)
        old, move = at.means["old"], self.b * (at.mean_q - at.means["old"])
        good, bad = old + move - mean_0, old - move - mean_0
        pull = self.a_max * (rho * good / _length(good, at.std) - (1 - rho) * bad / _length(bad, at.std))
        return at.mean_q - pull - (self.kl * (at.mean_q - at.means["prior"]) if self.kl else 0.0)


def _length(error: Float[Tensor, "batch *dims"], std: float) -> Float[Tensor, "batch *ones"]:
    """s: the mean of |error| / std over dimensions."""
    mean = error.abs().flatten(1).mean(1).clamp(min=SMALLEST) / std
    return mean.reshape(-1, *[1] * (error.ndim - 1))
