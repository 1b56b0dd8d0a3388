"""Objectives against numbers computed by hand, and the identities that connect them.

Tolerances: everything runs in float64 (unit roundoff 1e-16); sums of fewer than 1e3 terms of size S are good to 1e-12·S, so
`close` (1e-9) leaves three digits. Where another number is used its comment says why.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives._log_z import LearnedLogZ
from diffusion_rtb.objectives._penalty import Penalty
from diffusion_rtb.objectives.rtb import RTB, rtb_residual
from diffusion_rtb.objectives.trust_pcl import TrustPCL, trust_pcl_residual
from tests.oracles.terms import KlReinforce, at, betas, cases, close, cotangent, make_terms, random_terms, seeds


def by_hand() -> Terms:
    """Two trajectories of two steps with log_q - log_p = 0.5 and 4."""
    log_q = torch.tensor([[-1.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    log_p = torch.tensor([[-1.5, -2.0], [-1.0, -2.0]], dtype=torch.float64)
    return make_terms(log_q, log_p, torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_residual_by_hand() -> None:
    terms = by_hand()
    log_z = torch.tensor([0.25, 0.25], dtype=torch.float64)
    residual = rtb_residual(terms.log_q, terms.log_p, terms.reward, log_z, 2.0)
    close(residual, torch.tensor([0.25 + 0.5 - 2.0, 0.25 + 4.0 - 1.0], dtype=torch.float64))
    close(log_weight(terms.log_q, terms.log_p, terms.reward, 2.0), torch.tensor([1.5, -3.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "loss", "gradients"),
    [
        # residuals -1.25 and 3.25: (1.5625 + 10.5625) / 4; the gradient of a trajectory is residual / 2 in every step
        ({}, 3.03125, (-0.625, 1.625)),
        # Huber at 2: (0.78125 + 2·(3.25 - 1)) / 2; slopes -1.25 and 2
        ({"loss": "huber", "huber_delta": 2.0}, 2.640625, (-0.625, 1.0)),
        # residual + exp(-residual) - 1, 1.240343 and 2.288774; slopes 1 - exp(-residual) = -2.490343 and 0.961226
        (
            {"loss": "forward_kl"},
            (math.exp(1.25) + math.exp(-3.25)) / 2,
            ((1 - math.exp(1.25)) / 2, (1 - math.exp(-3.25)) / 2),
        ),
        # the sum of both
        (
            {"loss": "jeffreys"},
            3.03125 + (math.exp(1.25) + math.exp(-3.25)) / 2,
            ((-0.25 - math.exp(1.25)) / 2, (4.25 - math.exp(-3.25)) / 2),
        ),
        # 0 inside sqrt(2); what the edge on its own side would cost is off: 3.25 + exp(-3.25) - sqrt(2) - exp(-sqrt(2))
        (
            {"loss": "forward_kl", "dead_zone": 2.0},
            (3.25 + math.exp(-3.25) - math.sqrt(2) - math.exp(-math.sqrt(2))) / 2,
            (0.0, (1 - math.exp(-3.25)) / 2),
        ),
        # 1/2 relu(residual² - 2): the first is inside, (10.5625 - 2) / 4
        ({"dead_zone": 2.0}, 2.140625, (0.0, 1.625)),
        # reward units, beta 2: residuals -0.625 and 1.625, (0.390625 + 2.640625) / 4; slopes residual / 2 / beta
        ({"scale": "reward"}, 0.7578125, (-0.15625, 0.40625)),
    ],
)
def test_loss_by_hand(arguments: dict[str, Any], loss: float, gradients: tuple[float, float]) -> None:
    units = 2.0 if arguments.get("scale") == "reward" else 1.0
    objective = at(RTB("learned", **arguments), [0.25 / units])
    terms = by_hand()
    answer = objective(terms, 2.0)
    close(answer.loss, torch.tensor(loss, dtype=torch.float64))
    close(answer.residual, torch.tensor([-1.25, 3.25], dtype=torch.float64))
    close(answer.log_z, torch.tensor([0.25, 0.25], dtype=torch.float64))
    close(cotangent(objective, terms, 2.0), torch.tensor(gradients, dtype=torch.float64)[:, None].expand(2, 2))
    assert not answer.residual.requires_grad
    assert not answer.log_z.requires_grad


def test_vargrad_by_hand() -> None:
    answer = RTB()(by_hand(), 2.0)
    close(answer.log_z, torch.tensor([-0.75, -0.75], dtype=torch.float64))  # mean of 1.5 and -3
    close(answer.loss, torch.tensor(0.5 * 2.25**2, dtype=torch.float64))


def test_sub_trajectory_residual_by_hand() -> None:
    terms = by_hand()
    values = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.5]], dtype=torch.float64)
    residual = trust_pcl_residual(terms.log_q, terms.log_p, values, 2.0)
    # -V(x_i) + V(x_j) + (log_p - log_q) / 2
    expected = [[-0.0 + 0.5 - 0.25, -0.5 + 1.0 + 0.0], [-0.2 + 0.2 - 0.5, -0.2 + 0.5 - 1.5]]
    close(residual, torch.tensor(expected, dtype=torch.float64))


@cases
@given(seeds, betas)
def test_rtb_is_a_group_of_log_weights(seed: int, beta: float) -> None:
    """At the start posterior = prior, and the residual is log Z - beta·r."""
    terms = random_terms(seed)
    terms = replace(terms, log_p=terms.log_q.detach())
    answer = RTB()(terms, beta)
    close(answer.residual, answer.log_z - beta * terms.reward)


@cases
@given(seeds, betas, st.sampled_from(["learned", "per_prompt", "vargrad"]))
def test_trust_pcl_is_alpha_squared_rtb(seed: int, beta: float, kind: Any) -> None:
    terms, alpha = random_terms(seed), 1 / beta
    rtb, trust_pcl = RTB(kind).double(), TrustPCL(log_z=kind).double()
    for objective in (rtb, trust_pcl):
        objective.prepare(2, (2,), 3)
        objective.double()
    rtb(terms, beta)  # both set their log Z from this batch; moved away from it below
    trust_pcl(terms, beta)
    assert trust_pcl.whole is not None
    unit = float(getattr(trust_pcl.whole.log_z, "unit", 1.0))
    for log_z, value in zip(rtb.parameters(), trust_pcl.parameters(), strict=True):
        log_z.data.add_(0.7)
        value.data.add_(0.7 * alpha / unit)
        close(unit * value.data, alpha * log_z.data)  # V_soft(x_T) = alpha log Z
    balance, consistency = rtb(terms, beta), trust_pcl(terms, beta)
    close(consistency.loss, alpha**2 * balance.loss)
    close(consistency.residual, balance.residual)
    close(consistency.log_z, balance.log_z)
    leaves = [[terms.log_q, *rtb.parameters()], [terms.log_q, *trust_pcl.parameters()]]
    of_rtb = torch.autograd.grad(balance.loss, leaves[0])
    of_trust_pcl = torch.autograd.grad(consistency.loss, leaves[1])
    close(of_trust_pcl[0], alpha**2 * of_rtb[0])
    if kind != "vargrad":
        close(of_trust_pcl[1] / unit, alpha * of_rtb[1])  # dL/dV = dL/dlogZ · dlogZ/dV


@cases
@given(seeds, betas)
def test_vargrad_is_rtb_at_the_batch_optimal_log_z(seed: int, beta: float) -> None:
    terms = random_terms(seed, prompts=1)
    # The log Z of least loss, found by the optimizer's own condition and not as a mean: one Newton step from 0 is exact.
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    half_squares = 0.5 * rtb_residual(terms.log_q, terms.log_p, terms.reward, log_z.expand(6), beta) ** 2
    (slope,) = torch.autograd.grad(half_squares.mean(), log_z)
    best = float(-slope)  # the curvature of mean 1/2 (log Z - c)² is 1
    learned, vargrad = at(RTB("learned"), [0.0]), RTB("vargrad")
    assert isinstance(learned.log_z, LearnedLogZ)
    learned.log_z.value.data.fill_(best)
    close(vargrad(terms, beta).loss, learned(terms, beta).loss)
    close(cotangent(vargrad, terms, beta), cotangent(learned, terms, beta))


@cases
@given(seeds, betas)
def test_vargrad_through_the_mean_has_the_same_gradient(seed: int, beta: float) -> None:
    """The group variance of log w, differentiated through its mean; and the leave-one-out gradient, times (n - 1)/n."""
    terms = random_terms(seed, prompts=2)
    log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta)
    groups = [log_w[terms.prompt == row] for row in range(2)]
    variance = sum((0.5 * group.var(correction=0) for group in groups), torch.zeros(())) / 2
    (through,) = torch.autograd.grad(variance, terms.log_q, retain_graph=True)
    detached = cotangent(RTB(), terms, beta)
    close(detached, through)
    others = torch.stack([(log_w[terms.prompt == terms.prompt[i]].sum() - log_w[i]) / 2 for i in range(6)]).detach()
    (leave_one_out,) = torch.autograd.grad((0.5 * (others - log_w) ** 2).mean(), terms.log_q)
    close(detached, (3 - 1) / 3 * leave_one_out)


@cases
@given(seeds, betas)
def test_rtb_is_kl_regularised_reinforce(seed: int, beta: float) -> None:
    terms = random_terms(seed, prompts=1)
    close(cotangent(RTB(), terms, beta), beta * cotangent(KlReinforce(), terms, beta))


@cases
@given(seeds, betas, st.sampled_from([1, 2, 3, 6]))
def test_stretches_add_up_to_the_whole(seed: int, beta: float, length: int) -> None:
    """The inner values cancel: the residuals of the stretches add up to -alpha times RTB's."""
    terms = random_terms(seed, steps=6)
    objective = TrustPCL(length)
    objective.prepare(2, (2,), 3)
    objective.double()
    for parameter in objective.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    answer = objective(terms, beta)
    values = objective.boundary_values(terms, beta)
    stretches = trust_pcl_residual(terms.log_q, terms.log_p, values, beta)
    close(stretches.sum(dim=1), -answer.residual / beta)
    close(answer.loss, 0.5 * (stretches**2).mean())
    close(answer.log_z, beta * values[:, 0])


@cases
@given(seeds, betas, st.floats(0.01, 100.0), st.sampled_from(["squared", "huber"]))
def test_dead_zone_is_exactly_still_and_otherwise_unchanged(seed: int, beta: float, zone: float, loss: Any) -> None:
    terms = random_terms(seed, batch=8, prompts=1)
    plain, clipped = at(RTB("learned", loss), [0.3]), at(RTB("learned", loss, dead_zone=zone), [0.3])
    inside = plain(terms, beta).residual ** 2 <= zone
    gradient = cotangent(clipped, terms, beta)
    assert torch.count_nonzero(gradient[inside]) == 0
    assert torch.equal(gradient[~inside], cotangent(plain, terms, beta)[~inside])
    if loss == "squared":  # the paper's form
        close(clipped(terms, beta).loss, 0.5 * torch.relu(plain(terms, beta).residual ** 2 - zone).mean())


def test_dead_zone_stops_log_z_too() -> None:
    objective = at(RTB("learned", dead_zone=1e6), [0.3])
    objective(random_terms(0), 1.0).loss.backward()
    (parameter,) = objective.parameters()
    assert parameter.grad is not None
    assert torch.count_nonzero(parameter.grad) == 0


@cases
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0.1, 100))
def test_huber_is_the_textbook_function(residuals: list[float], delta: float) -> None:
    residual = torch.tensor(residuals, dtype=torch.float64)
    expected = [0.5 * d**2 if abs(d) <= delta else delta * (abs(d) - 0.5 * delta) for d in residuals]
    close(Penalty("huber", delta)(residual), torch.tensor(expected, dtype=torch.float64))
    close(Penalty("huber", delta)(residual).mean(), nn.functional.huber_loss(residual, 0 * residual, delta=delta))


def test_float32_keeps_what_sums_would_lose() -> None:
    """Log-densities of 16,384 dims: tens of thousands of nats per step whose differences are hundredths."""
    log_p = torch.full((1, 50), 40_000.0) + torch.arange(50)
    log_q = log_p + 1 / 64  # one unit in the last place at 4e4 is 1/256: representable
    reward, log_z = torch.zeros(1), torch.zeros(1)
    assert rtb_residual(log_q, log_p, reward, log_z, 1.0).item() == 50 / 64
    assert (log_q.sum() - log_p.sum()).item() != 50 / 64
