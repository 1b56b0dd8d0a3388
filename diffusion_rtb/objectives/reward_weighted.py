r"""Weighted maximum likelihood: the denoising loss on samples of an older posterior, by exp(beta·r).

    x_0 ~ q_old,  x_t its noised states,  w = exp(beta·r(x_0)) / mean of the prompt's samples
    loss = w·|mean_q(x_t) - mean_0|² / (2·std²),   mean_0 = E[x_s | x_t, x_0]: the step of a network that knows x_0

The minimiser's mean is E_q_old[w·mean_0 | x_t] / E_q_old[w | x_t], that of the denoiser of q_old·exp(beta·r) / Z. In the terms of
the network, whatever it predicts, noise, v, x_0 or the velocity u of a flow, the loss is c_t·w·|answer - answer_0|², answer_0
being that of a network that knows x_0.

* `refresh` null: q_old stays what it was at first, the prior. **One round, and exact**: the posterior, as far as the chain can be
  it.
* `refresh: n`: every n iterations q_old becomes the posterior, whose samples are weighted once more. Where each round ends at its
  minimum, round N is at p·exp(N·beta·r): it **runs away**, past every posterior, to the sample of the highest reward.
  `orw_cfm_w2` holds it.

Weights are normalised over the n samples of a prompt, which costs a bias of O(1/n); where exp(beta·r) spreads over many nats
few samples carry the round (an ESS near 1), and its samples are all that is seen of the posterior.

No stochastic gradient of a trajectory, no gradient of the reward, no call of the prior. It is written as an aim, mean_q -
w·(mean_q - mean_0), whose pull is the gradient of the loss; what is logged as `loss` is half the squared length of the pull. From
prior samples that are kept and drawn by their weight instead of weighed: `value_gradient` with from_samples 1.

Sources: Peters and Schaal 2007, https://doi.org/10.1145/1273496.1273590; of diffusion models, Lee et al. 2023,
https://arxiv.org/abs/2302.12192; online and of flows, Fan et al. 2025, https://arxiv.org/abs/2502.06061.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Samples, States
from diffusion_rtb.objectives._aiming import Aiming, boltzmann, target

__all__ = ["RewardWeighted"]


class RewardWeighted(Aiming):
    """Denoise samples of the older posterior, each by its exp(beta·r); see the module.

    Args:
        refresh: Iterations after which the older posterior becomes the posterior of the moment; None: never.

    Raises:
        ValueError: refresh is below 1.
    """

    compares: tuple[str, ...] = ()
    draws_old = True

    def __init__(self, refresh: int | None = None) -> None:
        super().__init__()
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh is a number of iterations, at least 1, or null for never; got {refresh}.")
        self.refresh = refresh

    def keeps_old(self, iteration: int) -> float:
        """1 within a round, 0 at its end."""
        return 1.0 if self.refresh is None or (iteration + 1) % self.refresh else 0.0

    def weights(self, samples: Samples, beta: float) -> Float[Tensor, " batch"]:
        """w; mean 1 over the samples of each prompt."""
        return boltzmann(type(self).__name__, samples, beta)

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """mean_q, pulled by the gradient of the loss; see the module."""
        mean_0, w = target(at)
        return at.mean_q - w * (at.mean_q - mean_0)
