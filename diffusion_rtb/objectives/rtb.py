r"""Relative trajectory balance (RTB).

The posterior of the prior p and the reward r is p*(x) = p(x)·exp(beta·r(x)) / Z. A chain q samples from it if on every
trajectory x_T, …, x_0

    Z · q(x_T, …, x_0) = p(x_T, …, x_0) · exp(beta·r(x_0))

and the residual is what is missing, in nats; x_T is drawn from the same noise by both, so its density cancels:

    residual = log Z + sum_t (log_q - log_p) - beta·r                 loss = mean over trajectories of 1/2 residual²

* The gradient with respect to the network is residual · grad log q: no backpropagation through sampling, no gradient of
  the reward, and **no importance weights** whoever drew the trajectories, because the residual is 0 on all of them at
  the optimum.
* Drawn on-policy, its expectation is grad KL(q || p*), whatever log Z is: log Z is then only a baseline. So on-policy RTB
  is KL-regularised REINFORCE, and loses modes as that does; coverage comes from the behaviour.
* At the start the posterior is the prior, and residual = log Z - beta·r.
* One log Z for all x_T can only be right where the noise x_T says nothing about the reward (a *memoryless* chain: DDIM
  with eta = 1 or more, ancestral samplers). Otherwise use `TrustPCL(length=steps)`, whose V(x_T) depends on x_T.

Source: Venkatraman, Jain, Scimeca, Kim, Sendera et al. 2024, https://arxiv.org/abs/2405.20971 (its loss has no 1/2).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.objectives._checks import check_choice, check_terms
from diffusion_rtb.objectives._log_z import build_log_z
from diffusion_rtb.objectives._penalty import Penalty, PenaltyKind

__all__ = ["RTB", "rtb_residual"]

SCALES = ("nats", "reward")


def rtb_residual(
    log_q: Float[Tensor, "batch steps"],
    log_p: Float[Tensor, "batch steps"],
    reward: Float[Tensor, " batch"],
    log_z: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, " batch"]:
    """residual = log_z + sum_t (log_q - log_p) - beta·reward; nats."""
    return log_z - log_weight(log_q, log_p, reward, beta)


class RTB(nn.Module):
    """Relative trajectory balance, an `Objective`: loss = mean 1/2 residual², residual = log Z + log_q - log_p - beta·r.

    Args:
        log_z: where log Z comes from: "vargrad" (the mean over each prompt's trajectories of the batch, nothing learned),
            "per_prompt" or "learned" (parameters, set from the first batch).
        loss: "squared", "huber" (bounded slope), "forward_kl" (mode covering: residual + exp(-residual) - 1) or "jeffreys", the
            sum of the first and the third; `_penalty` says whose gradient each is. Under the last two VarGrad's log Z is the one
            at which they are least.
        huber_delta: where Huber's slope stops growing; nats.
        dead_zone: c: a trajectory with residual² <= c makes no update; nats².
        scale: "nats" for the RTB loss; "reward" for alpha² times it (the Trust-PCL scale). The gradient is taken in nats either
            way; a learned log Z is kept as log Z, or as V = log Z / beta, which hardly moves when beta is annealed.

    Raises:
        ValueError: an argument is none of those allowed.
    """

    def __init__(
        self,
        log_z: Literal["learned", "per_prompt", "vargrad"] = "vargrad",
        loss: PenaltyKind = "squared",
        *,
        huber_delta: float = 1.0,
        dead_zone: float = 0.0,
        scale: Literal["nats", "reward"] = "nats",
    ) -> None:
        super().__init__()
        self.penalty = Penalty(loss, huber_delta, dead_zone)
        in_reward_units = check_choice("scale", scale, SCALES) == "reward"
        self.log_z = build_log_z(log_z, self.penalty, in_reward_units=in_reward_units)
        self.smallest_group = 2 if log_z == "vargrad" else 1
        self.scale = scale

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Create the log Z of `prompts` prompts; before the optimizer and before a state dict is loaded."""
        self.log_z.prepare(prompts)

    def forward(self, terms: Terms, beta: float) -> Loss:
        """The loss of a batch of whole trajectories; `beta` in nats per unit of reward.

        Raises:
            ValueError: beta <= 0, a shape that would broadcast, a value that is not finite, a group of one trajectory
                under VarGrad.
        """
        check_terms(terms, beta)
        log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta)
        log_z: Tensor = self.log_z(log_w, terms.prompt, beta)
        residual = rtb_residual(terms.log_q, terms.log_p, terms.reward, log_z, beta)
        loss, to_nats = torch.mean(self.penalty(residual)), beta**2 if self.scale == "reward" else 1.0
        return Loss(loss / to_nats, residual.detach(), log_z.detach(), to_nats)
