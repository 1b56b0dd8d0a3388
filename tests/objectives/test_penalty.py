"""Losses of f-trajectory balance: whose gradient they are, the log Z that makes them least, and that they stay finite."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from diffusion_rtb.objectives._groups import same_prompt
from diffusion_rtb.objectives._penalty import FARTHEST, Penalty
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from tests.oracles.affine_policy import example, expected_gradient
from tests.oracles.terms import at, close, cotangent, random_terms

BETA = 1.7


def divergence(kind: str, theta: torch.Tensor) -> torch.Tensor:
    """KL(q || p*), KL(p* || q) or their sum, up to constants, of the chain of `example`; nats."""
    policy = example()
    reverse = policy.kl(theta) - BETA * policy.expected_reward(theta)
    forward = policy.cross_entropy(theta, BETA)
    return {"squared": reverse, "forward_kl": forward, "jeffreys": reverse + forward}[kind]


@pytest.mark.parametrize("kind", ["squared", "forward_kl", "jeffreys"])
def test_expected_gradient_is_that_of_its_divergence(kind: Any) -> None:
    """On q's own trajectories, at the true log Z; and it is not that of the other one."""
    policy = example()
    kinds = ("squared", "forward_kl", "jeffreys")
    truth = {name: policy.gradient(partial(divergence, name)) for name in kinds}
    found = expected_gradient(policy, at(RTB("learned", kind), [policy.log_z(BETA)]), beta=BETA, groups=400, batches=10)
    for name, gradient in truth.items():
        # Of 6 entries, each Normal: 4 is passed by chance in 4 of 10,000 seeds.
        assert (found.distance(gradient) < 4) == (name == kind), name


def test_log_z_of_the_chain() -> None:
    """The oracle against log E_p[exp(beta·r)] by torch.distributions in one dimension, x_0 being Normal."""
    policy = example()
    means, variances = policy.moments(policy.prior)
    nodes = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log_density = torch.distributions.Normal(means[-1], variances[-1].sqrt()).log_prob(nodes)
    values = log_density + BETA * policy.reward(nodes[:, None])
    close(torch.logsumexp(values, 0) + math.log(24 / 20_000), torch.tensor(policy.log_z(BETA), dtype=torch.float64))


@pytest.mark.parametrize("kind", ["squared", "forward_kl", "jeffreys"])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 30.0, 3000.0])
def test_the_log_z_of_a_group_is_a_minimum(kind: Any, spread: float) -> None:
    """sum h'(log Z - log w) = 0 in every group, whatever its weights."""
    log_w = spread * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 500
    prompt = torch.arange(60) % 3
    member, _ = same_prompt(prompt)
    penalty = Penalty(kind)
    log_z = penalty.log_z(log_w, member).requires_grad_()
    (slope,) = torch.autograd.grad(penalty(log_z[prompt] - log_w).sum(), log_z)
    scale = (1 + (log_z[prompt] - log_w).abs()).sum().detach()
    assert float(slope.abs().max() / scale) < 1e-9


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_the_detached_log_z_changes_no_gradient(kind: Any) -> None:
    """forward_kl in a group is log mean w - mean log w, and its gradient may go through both means."""
    terms = random_terms(3, prompts=1)
    log_w = (BETA * terms.reward - (terms.log_q - terms.log_p).sum(1)).detach().requires_grad_()
    gap = torch.logsumexp(log_w, 0) - math.log(len(log_w)) - log_w.mean()
    if kind == "jeffreys":
        member, _ = same_prompt(terms.prompt)
        log_z = Penalty(kind).log_z(log_w, member)
        gap = Penalty(kind)(log_z - log_w).mean()
    (by_log_w,) = torch.autograd.grad(gap, log_w)
    objective = RTB(loss=kind)
    close(objective(terms, BETA).loss, gap.detach())
    close(cotangent(objective, terms, BETA), -by_log_w[:, None].expand_as(terms.log_q))


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_far_residuals_stay_finite_and_convex(kind: Any) -> None:
    """In float32, to 10,000 nats: slopes rise throughout and pass 0 at 0, and their squares are finite."""
    d = torch.cat(
        [torch.linspace(-10_000, -21, 50), torch.linspace(-FARTHEST, 20, 401), torch.linspace(21, 10_000, 50)]
    )
    d.requires_grad_()
    cost = Penalty(kind)(d)
    (slope,) = torch.autograd.grad(cost.sum(), d)
    assert bool(cost.isfinite().all())
    assert bool(slope.square().sum().isfinite())
    assert bool((slope.diff() >= -2e-7 * slope[1:].abs()).all())  # one rounding of float32
    zero = int(d.abs().argmin())
    assert bool((slope[: zero - 1] < 0).all())
    assert bool((slope[zero + 2 :] > 0).all())
    # A group cannot come there: no trajectory weighs more than all of them.
    assert -Penalty(kind).log_z(torch.tensor([0.0, 1e4]), torch.ones(1, 2, dtype=torch.bool)) < 1e4


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_trust_pcl_has_the_sign_of_rtb(kind: Any) -> None:
    """A stretch of all steps whose V(x_T) is log Z / beta is RTB at that log Z; an asymmetric loss sees a wrong sign."""
    terms = random_terms(5, prompts=1)
    stretch = TrustPCL(length=4, loss=kind)
    stretch.prepare(1, (2,), 3)
    stretch.double()
    answer = stretch(terms, BETA)
    whole = at(RTB("learned", kind), [float(answer.log_z[0])])
    close(answer.loss * answer.to_nats, whole(terms, BETA).loss)
    close(cotangent(stretch, terms, BETA) * BETA**2, cotangent(whole, terms, BETA))
