"""Preferences: by hand, at the posterior, against quadrature elsewhere, and what hard labels and single steps lack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives.dpo import DPO
from diffusion_rtb.objectives.rtb import RTB
from tests.oracles.terms import close, cotangent, make_terms, random_terms

BETA = 2.0


def reward(x: Tensor) -> Tensor:
    return -0.5 * (x - 1.5) ** 2


POSTERIOR = Normal(BETA * 1.5 / (1 + BETA), torch.tensor(1 + BETA, dtype=torch.float64) ** -0.5)
"""Of the prior N(0, 1) and this reward, by completing the square."""


def terms_at(x: Tensor, q: Normal, group: int) -> Terms:
    """One step, groups of neighbours."""
    prior = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    prompt = [i // group for i in range(len(x))]
    return make_terms(q.log_prob(x)[:, None], prior.log_prob(x)[:, None], reward(x), prompt)


def draws(count: int, seed: int = 0) -> Tensor:
    """Of N(0.3, 1.2²), neither prior nor posterior."""
    return 0.3 + 1.2 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("labels", "y"), [("soft", 1 / (1 + math.exp(-0.6))), ("hard", 1.0)])
def test_a_pair_by_hand(labels: Any, y: float) -> None:
    """log q - log p = 0.5 and 4, rewards 1 and 0.5, beta 2, slope 0.6: z = -2.1, beta·(r_1 - r_2)·slope = 0.6."""
    log_q = torch.tensor([[-1.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    log_p = torch.tensor([[-1.5, -2.0], [-1.0, -2.0]], dtype=torch.float64)
    terms = make_terms(log_q, log_p, torch.tensor([1.0, 0.5], dtype=torch.float64))
    objective = DPO(labels, slope=0.6)
    sigma = 1 / (1 + math.exp(2.1))
    close(objective(terms, 2.0).loss.item(), -y * math.log(sigma) - (1 - y) * math.log(1 - sigma))
    slope = 0.6 * (sigma - y)
    close(cotangent(objective, terms, 2.0), torch.tensor([[slope], [-slope]], dtype=torch.float64).expand(2, 2))


@pytest.mark.parametrize("pairs", ["all", "best_worst"])
@pytest.mark.parametrize("slope", [0.1, 1.0, 5.0])
def test_soft_labels_are_at_rest_at_the_posterior(pairs: Any, slope: float) -> None:
    """On each pair of another chain's draws, not on average; and q moved by a hundredth is not."""
    x = draws(64)
    objective = DPO("soft", pairs, slope=slope)
    assert float(cotangent(objective, terms_at(x, POSTERIOR, 4), BETA).abs().max()) < 1e-12
    moved = Normal(POSTERIOR.mean + 0.01, POSTERIOR.stddev)
    assert float(cotangent(objective, terms_at(x, moved, 4), BETA).abs().max()) > 1e-9


def test_expected_gradient_is_that_of_the_expected_cross_entropy() -> None:
    """With respect to mean and log std of q, by quadrature over both members of a pair; within 4 standard errors."""
    mean = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    nodes = torch.linspace(-8, 8.6, 400, dtype=torch.float64)
    weight = Normal(0.3, 1.2).log_prob(nodes).exp() * (nodes[1] - nodes[0])
    ratio = Normal(mean, log_std.exp()).log_prob(nodes) - Normal(0.0, 1.0).log_prob(nodes)
    z, y = ratio[:, None] - ratio, torch.sigmoid(BETA * (reward(nodes)[:, None] - reward(nodes)))
    loss = (weight[:, None] * weight * (torch.nn.functional.softplus(z) - y * z)).sum()
    exact = torch.autograd.grad(loss, [mean, log_std])

    x, q = draws(2400), Normal(mean.detach(), log_std.detach().exp())
    weights = cotangent(DPO(), terms_at(x, q, 4), BETA)[:, 0] * 600
    standard = (x - q.mean) / q.stddev
    for score, expected in zip([standard / q.stddev, standard**2 - 1], exact, strict=True):
        each = (weights * score).unflatten(0, (600, 4)).sum(1)
        assert abs(float(each.mean() - expected)) < 4 * float(each.std()) / math.sqrt(600)


@pytest.mark.parametrize(("labels", "rests"), [("soft", True), ("hard", False)])
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_hard_labels_ask_for_more_at_every_strength(labels: Any, rests: bool, strength: float) -> None:
    """d loss / d s at log q - log p = s·beta·r - log Z, s = 1: 0 for soft labels at the beta of the run, below 0 for hard ones."""
    x = draws(64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    terms = terms_at(x, POSTERIOR, 8)
    terms = replace(terms, log_q=terms.log_p + scale * strength * BETA * reward(x)[:, None] - 0.7)
    (slope,) = torch.autograd.grad(DPO(labels)(terms, strength * BETA).loss, scale)
    assert float(slope.abs()) < 1e-12 if rests else float(slope) < -1e-4


def test_a_small_slope_is_vargrad() -> None:
    """4 / slope² times the gradient of all pairs is 2n / (n - 1) times that of 1/2 variance of log w: 2.4 for 6."""
    terms = random_terms(1, prompts=1)
    pairwise = cotangent(DPO(slope=1e-4), terms, BETA) * 4e8
    torch.testing.assert_close(pairwise, 2.4 * cotangent(RTB(), terms, BETA), rtol=1e-5, atol=1e-5)


def test_prompts_have_the_same_say() -> None:
    """Groups of 2 and 4: the loss is the mean of what each says alone."""
    terms = replace(random_terms(2, prompts=1), prompt=torch.tensor([0, 1, 1, 0, 1, 1]))
    losses = []
    for row in (0, 1):
        here = terms.prompt == row
        losses.append(DPO()(make_terms(terms.log_q[here], terms.log_p[here], terms.reward[here]), BETA).loss)
    close(DPO()(terms, BETA).loss, (losses[0] + losses[1]) / 2)


def test_steps_are_pairs_of_their_own() -> None:
    """The sum of what each step says as a trajectory of one step; a ratio beyond the range gets no gradient."""
    terms = random_terms(4, prompts=1)
    alone = [
        DPO("hard")(make_terms(terms.log_q[:, [t]], terms.log_p[:, [t]], terms.reward), BETA).loss for t in range(4)
    ]
    close(DPO("hard", ratios="step")(terms, BETA).loss, torch.stack(alone).sum())
    clipped = cotangent(DPO("hard", ratios="step", clip_range=0.5), terms, BETA)
    ratio = torch.exp(terms.log_q - terms.log_p)
    assert torch.equal(clipped == 0, (ratio < 0.5) | (ratio > 1.5))


def test_equal_rewards_are_a_coin() -> None:
    """A pair of two trajectories all the same, which asks for equal weights; hard labels are 1/2."""
    terms = replace(random_terms(6, prompts=1), reward=torch.ones(6, dtype=torch.float64))
    gradient = cotangent(DPO("hard", "best_worst"), terms, BETA)[:, 0]
    moved = (terms.log_q - terms.log_p).sum(1).detach()
    assert int((gradient != 0).sum()) == 2
    close(gradient[0], torch.sigmoid(moved[0] - moved[5]) - 0.5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"clip_range=0.2 bounds ratios of single steps.*ratios=\"step\""):
        DPO(clip_range=0.2)
    with pytest.raises(ValueError, match="slope must be a positive finite number, got 0"):
        DPO(slope=0.0)
    with pytest.raises(ValueError, match=r"dpo compares the trajectories of one prompt.* group of size 1"):
        DPO()(random_terms(0, batch=1, prompts=1), 1.0)
