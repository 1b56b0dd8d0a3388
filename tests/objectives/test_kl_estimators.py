"""KL estimators: values against quadrature, placements against exact gradients, and the identities between them.

Tolerances: `close` is 1e-9 in float64 (see test_objectives). Averages over draws are held to 5 standard errors of each of six
parameters, which chance exceeds once in 3e5 times, and what is biased has to be beyond 8.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusion_rtb.objectives._checks import check_policy_terms
from diffusion_rtb.objectives._kl_estimators import KlEstimator, KlOption, k1, k2, k3
from tests.measurements.kl_estimator_table import EXPECTED, OPTIONS, KlAlone, measure, table
from tests.oracles.affine_policy import AffinePolicy, example
from tests.oracles.terms import cases, close, random_terms, seeds

CHANCE, SEEN = 5.0, 8.0

UNBIASED = {"k1_reward", "gaussian", "path_k2_loss"}


@cases
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
def test_values_are_the_textbook_functions(values: list[float]) -> None:
    log_ratio = torch.tensor(values, dtype=torch.float64)
    close(k1(log_ratio), log_ratio)
    close(k2(log_ratio), torch.tensor([v * v / 2 for v in values], dtype=torch.float64))
    expected = torch.tensor([math.exp(-v) - 1 + v for v in values], dtype=torch.float64)
    torch.testing.assert_close(k3(log_ratio), expected, rtol=1e-9, atol=1e-9)
    assert bool((k3(log_ratio) >= 0).all())


@pytest.mark.parametrize("apart", [0.1, 0.7, 1.5])
def test_means_by_quadrature(apart: float) -> None:
    """Gauss-Hermite with 80 nodes integrates polynomials and exp(-1.5 z) in z ~ N(0, 1) to rounding."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    q, p = Normal(torch.tensor(apart, dtype=torch.float64), 1.0), Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    log_ratio = q.log_prob(apart + z) - p.log_prob(apart + z)
    exact = kl_divergence(q, p)
    close((w * k1(log_ratio)).sum(), exact)
    close((w * k3(log_ratio)).sum(), exact)
    close((w * k2(log_ratio)).sum(), exact + exact**2 / 2)  # too high


@pytest.mark.parametrize("name", OPTIONS)
def test_the_expected_gradient_is_the_one_the_page_says(name: KlOption) -> None:
    row = measure(name, 150_000, seed=1)
    assert row.from_expected is None or row.from_expected < CHANCE
    if name in UNBIASED:
        assert row.from_exact < CHANCE
    else:
        assert row.from_exact > SEEN
        assert row.bias > 0.05
    assert row.biased == (name not in UNBIASED)
    assert f"| `{name}` | " in table([row])


def test_every_option_is_in_the_table() -> None:
    assert {*EXPECTED, "none"} == set(get_args(KlOption))


def test_the_closed_form_has_the_least_noise() -> None:
    noise = {
        name: measure(name, 50_000).noise for name in ("k2_loss", "k3_loss", "gaussian_loss", "k1_reward", "gaussian")
    }
    assert noise["gaussian_loss"] < 0.6 * min(noise["k2_loss"], noise["k3_loss"])
    assert noise["gaussian"] < 0.6 * noise["k1_reward"]


@cases
@given(seeds)
def test_k3_in_both_places_is_k1_in_the_reward(seed: int) -> None:
    """Term by term and not only on average, for the same l: of whole trajectories here."""
    policy = example()
    terms = policy.terms(policy.sample(16, torch.Generator().manual_seed(seed)))
    in_reward = policy.gradients(KlAlone("path_k3_reward"), terms, 1.0)
    in_loss = policy.gradients(KlAlone("path_k3_loss"), terms, 1.0)
    close(in_reward + in_loss, policy.gradients(KlAlone("k1_reward"), terms, 1.0))
    close(policy.gradients(KlAlone("path_k2_loss"), terms, 1.0), policy.gradients(KlAlone("k1_reward"), terms, 1.0))


def test_far_from_the_prior_k3_in_the_loss_pulls_no_more() -> None:
    """One step, KL = 18 nats: the pull is carried by one sample in millions, and 4,096 draws see none of it."""
    prior = torch.zeros(1, 2, dtype=torch.float64)
    policy = AffinePolicy(torch.tensor([[0.0, 6.0]], dtype=torch.float64), prior, torch.ones(1, dtype=torch.float64))
    assert float(policy.kl(policy.theta)) == pytest.approx(18)
    pull = {}
    for name in ("k3_loss", "gaussian_loss", "k2_loss"):
        terms = policy.terms(policy.sample(4096, torch.Generator().manual_seed(0)))
        pull[name] = float(policy.gradients(KlAlone(name), terms, 1.0).mean(0)[0, 1])
    assert pull["gaussian_loss"] == pytest.approx(6)
    assert pull["k2_loss"] == pytest.approx(6, abs=2)  # noise of one draw 19: standard error 0.3
    assert abs(pull["k3_loss"]) < 1


def test_in_the_reward_it_keeps_the_densities_of_the_drawing_chain() -> None:
    """At a second update log_q has moved; what the drawn trajectories paid has not. In the loss the newest counts."""
    terms = random_terms(0)
    drawn = terms.log_q.detach() - 0.3
    later = replace(terms, log_behaviour=drawn)
    close(KlEstimator("k1_reward").in_reward(later), (drawn - terms.log_p).sum(1))
    close(KlEstimator("k1_loss").in_loss(later), (terms.log_q - terms.log_p).sum(1))


@pytest.mark.parametrize("name", get_args(KlOption))
def test_places(name: KlOption) -> None:
    estimator = KlEstimator(name)
    terms = random_terms(1)
    terms = replace(terms, kl=torch.rand(6, 4, dtype=torch.float64).requires_grad_())
    assert not estimator.in_reward(terms).requires_grad
    assert bool(estimator.in_reward(terms).any()) == estimator.placed_in_reward
    assert estimator.in_loss(terms).requires_grad == estimator.placed_in_loss
    assert estimator.uses_kl == ("gaussian" in name)
    assert (estimator.placed_in_reward or estimator.placed_in_loss) == (name != "none")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kl must be one of none, k1_reward, .* got 'k4_reward'"):
        KlEstimator("k4_reward")
    with pytest.raises(ValueError, match=r"needs the closed-form KL .* it is None"):
        check_policy_terms(random_terms(0), 1.0, uses_kl=True)
    short = replace(random_terms(0), kl=torch.zeros(6, 4, dtype=torch.float64))
    object.__setattr__(short, "kl", torch.zeros(6, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"kl has the shape \(6, 1\), but log_q is \(6, 4\)"):
        check_policy_terms(short, 1.0, uses_kl=True)
    infinite = replace(random_terms(0), kl=torch.full((6, 4), math.inf, dtype=torch.float64))
    with pytest.raises(ValueError, match="kl of trajectory 0, step 0, is inf"):
        check_policy_terms(infinite, 1.0, uses_kl=True)
