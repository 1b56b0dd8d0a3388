r"""Estimates of KL(q || p) of a chain, and where they are placed: one option, `kl`.

With l_t = log_q - log_p of a transition x_t -> x_s drawn from q, and L = sum_t l_t,

    k1 = l      k2 = 1/2 l²      k3 = exp(-l) - 1 + l      gaussian = KL(q(.|x_t) || p(.|x_t)), in closed form

k1, k3 and gaussian have the KL as their mean, k2 up to third order in l. **What matters is the gradient**, and that depends
on the place. In the *reward* the estimate K is a detached number that scales grad log q; in the *loss* it is differentiated:

    reward   E[ K · grad log q(trajectory) ]            loss   E[ grad K ]

The gradient of KL(q || p) has two parts: what a step adds at the states where it is (*local*), and what it changes for the steps
after it by sending them to other states (*future*):

    grad KL(q || p) = E[ sum_t grad KL_t(x_t) ]  +  E[ sum_t KL_t(x_t) · sum_{u before t} grad log q_u ]

    option            expected gradient, for transitions of equal variance in q and p
    ----------------  ---------------------------------------------------------------------------------
    k1_reward         local + future: right
    k1_loss           0: no regularisation, only noise
    k2_loss           local
    k3_loss           local                    (in general the local part of KL(p || q))
    gaussian_loss     local, without the noise of k2 and k3
    k3_reward         future                   (in general also local parts of KL(q || p) - KL(p || q))
    gaussian_reward   future
    gaussian          local + future: right    (both places)
    k2_reward         neither
    path_k2_loss      local + future: right    (1/2 L² of the whole trajectory: VarGrad's own term)
    path_k3_loss      that of KL(p || q) of the trajectories
    path_k3_reward    that of KL(q || p) - KL(p || q)
    path_k2_reward    neither

`objectives/README.md` has the measured table, with confidence intervals. k3 of the same l in both places is k1 in the reward, term
by term: (1 - exp(-l)) + (exp(-l) - 1 + l) = l.

All of this is on-policy; where a batch is used for several updates, what is in the reward keeps the densities of the drawing chain.

Sources: k1, k2, k3: Schulman 2020, http://joschu.net/blog/kl-approx.html; placements: Shah et al. 2025,
https://arxiv.org/abs/2512.21852.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives._checks import check_choice
from diffusion_rtb.objectives._policy import behaviour

__all__ = ["KlEstimator", "KlOption", "k1", "k2", "k3"]

KlOption = Literal[
    "none",
    "k1_reward",
    "k1_loss",
    "k2_reward",
    "k2_loss",
    "k3_reward",
    "k3_loss",
    "gaussian",
    "gaussian_reward",
    "gaussian_loss",
    "path_k2_reward",
    "path_k2_loss",
    "path_k3_reward",
    "path_k3_loss",
]


def k1(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """l = log_q - log_p; nats, of either sign."""
    return log_ratio


def k2(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1/2 l²; nats."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(-l) - 1 + l; nats, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


FUNCTIONS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class KlEstimator:
    """An estimate of KL(q || p) in its place.

    Raises:
        ValueError: no such option.
    """

    name: str = "none"
    """A `KlOption`."""

    def __post_init__(self) -> None:
        check_choice("kl", self.name, get_args(KlOption))

    @property
    def uses_kl(self) -> bool:
        """It reads `Terms.kl`."""
        return self.name.startswith("gaussian")

    @property
    def placed_in_reward(self) -> bool:
        return self.name.endswith("_reward") or self.name == "gaussian"

    @property
    def placed_in_loss(self) -> bool:
        return self.name.endswith("_loss") or self.name == "gaussian"

    def in_reward(self, terms: Terms) -> Float[Tensor, " batch"]:
        """What each trajectory pays in its reward, detached; nats, 0 for an option of the loss alone."""
        if not self.placed_in_reward:
            return torch.zeros_like(terms.reward)
        return self._estimate(terms, behaviour(terms)).detach()

    def in_loss(self, terms: Terms) -> Float[Tensor, " batch"]:
        """What each trajectory adds to the loss, differentiable in `terms.log_q` or `terms.kl`; nats."""
        if not self.placed_in_loss:
            return torch.zeros_like(terms.reward)
        return self._estimate(terms, terms.log_q)

    def _estimate(self, terms: Terms, log_q: Float[Tensor, "batch steps"]) -> Float[Tensor, " batch"]:
        if self.uses_kl:
            assert terms.kl is not None, "check_policy_terms asks for it"
            return terms.kl.sum(dim=1)
        log_ratio = log_q - terms.log_p
        function = FUNCTIONS[self.name.removeprefix("path_")[:2]]
        if self.name.startswith("path_"):
            return function(log_ratio.sum(dim=1))
        return function(log_ratio).sum(dim=1)
