r"""Adjoint matching: the reward's gradient, led back along the posterior's trajectories, as the target of each transition.

    adjoint(x_0) = -beta·grad r(x_0)
    lean   adjoint(x_t) = J_p(x_t)ᵀ adjoint(x_s)
    full   adjoint(x_t) = J_q(x_t)ᵀ (adjoint(x_s) + d(x_t)) - J_p(x_t)ᵀ d(x_t),    d = (mean_q - mean_p) / std²
    aim(x_t) = mean_p(x_t) - std²·adjoint(x_s)
    loss = mean over states of |mean_q(x_t) - aim(x_t)|² / (2·std²)                                         nats

J is the Jacobian of a transition's mean, x_s the state that x_t went to. The posterior's chain has mean_q - mean_p =
std²·grad log F(x_s) where steps are small, log F(x_s) = log E_p[exp(beta·r(x_0)) given x_s], and under it the mean of the lean
adjoint given x_s is -grad log F(x_s): it is where nothing pulls any more. `value_gradient` has the same aim with a learned V in the
place of the adjoint: no reward gradient, no trajectories, and the errors of V.

**lean** leaves out what the posterior's own shifts add to the adjoint, which vanishes on average at the optimum and is noise
elsewhere; it reads the prior's network alone. With steps that are not small it comes to rest next to the best chain.
Along trajectories of the prior that were drawn by exp(beta·r), which are the posterior's, the mean of the aim given x_t *is* that
of the posterior's transition, for any steps: `prior_buffer` with `resample: true` says where to go before own samples get there, as
weighted maximum likelihood does, whose target x_s has the noise of the step on top.
**full** is exact for any steps: the gradient of one update on all steps *is* that of `reward_backprop`, as a regression of states,
so that `gradient_steps`, `step_weights` and several updates on the same trajectories go with it.

Source: Domingo-Enrich et al. 2024, https://arxiv.org/abs/2409.08861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Loss, States, Terms
from diffusion_rtb.objectives._checks import check_choice, check_terms
from diffusion_rtb.objectives._policy import report

__all__ = ["AdjointMatching"]


class AdjointMatching:
    """Aim each transition against its adjoint; see the module.

    Args:
        adjoint: "lean" or "full".

    Raises:
        ValueError: it is another word.
    """

    on_policy_only = True
    bears_updates = True
    needs_gradient = True

    def __init__(self, adjoint: Literal["lean", "full"] = "lean") -> None:
        self.adjoint = check_choice("adjoint", adjoint, ("lean", "full"))
        self.bears_posterior = adjoint == "lean"

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def __call__(self, terms: Terms, beta: float) -> Loss:
        """What is said of the posterior's own trajectories, for the log; nothing is learned from it. See `report`."""
        check_terms(terms, beta)
        return report(torch.zeros((), device=terms.reward.device), terms, beta)

    def aim(self, at: States, beta: float) -> Float[Tensor, "batch *dims"]:
        """Where the mean of each transition should be; see the module."""
        assert at.adjoint is not None
        return at.means["prior"] - at.std**2 * at.adjoint
