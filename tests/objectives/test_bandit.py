"""The three-armed bandit of https://arxiv.org/abs/2509.24203: whose optimum does not depend on who drew the arms."""

from __future__ import annotations

from typing import Any

import torch
from torch.testing import assert_close

from diffusion_rtb.objectives.ddpo import DDPO
from diffusion_rtb.objectives.rtb import RTB
from tests.oracles.terms import make_terms

DRAWN = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 2])
"""Ten draws of another policy, (0.3, 0.6, 0.1), in exactly these proportions: a batch is its expectation."""
REWARD = torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64)
BETA = 20.0


def trained(objective: Any, lr: float, updates: int) -> torch.Tensor:
    """Log-probabilities of the arms after descent of softmax logits on these draws; the prior is uniform."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_p = torch.full((10, 1), 1 / 3, dtype=torch.float64).log()
    for _ in range(updates):
        log_q = theta.log_softmax(0)[DRAWN][:, None]
        terms = make_terms(log_q, log_p, REWARD[DRAWN])
        objective(terms, BETA).loss.backward()
        (slope,) = torch.autograd.grad(log_q, theta, terms.log_q.grad)
        theta = (theta - lr * slope).detach().requires_grad_()
    return theta.log_softmax(0).detach()


def test_group_relative_reinforce_goes_to_the_arm_that_is_drawn_most() -> None:
    """Not to the best one: its drift b·(r - mean r) / std is constant, -0.174 : 0.132 : 0.042, and arm 2 has 0.8."""
    found = trained(DDPO(), lr=1.0, updates=60)
    share = DRAWN.bincount() / 10
    mean = share @ REWARD.float()
    std = (share @ (REWARD.float() - mean) ** 2).sqrt() + 1e-4 / BETA
    assert_close(found, (60 * share * (REWARD.float() - mean) / std).double().log_softmax(0), rtol=1e-4, atol=1e-4)
    assert float(found[1].exp()) > 0.99


def test_vargrad_goes_to_the_posterior_on_the_same_draws() -> None:
    """p·exp(beta·r) / Z, 98 % of it the arm that one draw of ten shows."""
    found = trained(RTB(), lr=1.0, updates=300)
    assert_close(found, (BETA * REWARD).log_softmax(0), rtol=1e-6, atol=1e-6)
    assert 0.98 < float(found[2].exp()) < 0.983
