"""What policy gradients share: group baselines, clipped ratios to the chain that drew, and the numbers that are logged.

A *group* is the trajectories of one prompt in the batch. A baseline that does not depend on the trajectory it is subtracted
from leaves the expected gradient as it is, because E_q[grad log q] = 0:

    mean            mean of the group, the trajectory itself included: (n - 1)/n times the gradient, in a group of n
    leave_one_out   mean of the others: the gradient itself
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._groups import mean_of_group

__all__ = ["PolicyGradient", "behaviour", "clipped_loss", "report"]


class PolicyGradient(nn.Module):
    """Base of objectives on the posterior's own trajectories that own nothing."""

    on_policy_only = True

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""


def behaviour(terms: Terms) -> Float[Tensor, "batch steps"]:
    """Log-density of the transitions under the chain that drew them: the posterior as it is now where nothing else is known."""
    return (terms.log_q if terms.log_behaviour is None else terms.log_behaviour).detach()


def clipped_loss(
    log_q: Float[Tensor, "batch steps"],
    log_behaviour: Float[Tensor, "batch steps"],
    advantage: Float[Tensor, "batch #steps"],
    clip_range: float,
) -> Float[Tensor, " batch"]:
    r"""sum_t max(-A·rho_t, -A·clip(rho_t, 1 - c, 1 + c)), rho_t = exp(log_q - log_behaviour), of each trajectory.

    Where rho = 1, at the first update after drawing, its gradient is that of -A·log_q. A step whose ratio has left the range
    in the direction that A asks for gets no gradient.

    Args:
        log_q: posterior log-densities, summed over dims; nats.
        log_behaviour: those of the chain that drew the trajectories; nats.
        advantage: one per trajectory or one per step, detached.
        clip_range: c, on ratios of densities summed over dims.

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347.
    """
    ratio = torch.exp(log_q - log_behaviour)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped).sum(dim=1)


def report(loss: Float[Tensor, ""], terms: Terms, beta: float, to_nats: float = 1.0) -> Loss:
    """The answer of an objective without a log Z of its own: residuals against the group's mean log w, as under VarGrad.

    In a group of one they are 0 and say nothing; what needs larger groups asks for them in `group_baseline`.
    """
    log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta).detach()
    log_z = mean_of_group(log_w, terms.prompt)
    return Loss(loss, log_z - log_w, log_z, to_nats)
