"""Metrics against closed forms, literal values, plain-Python re-implementations and their invariances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from diffusion_rtb import estimates as metrics
from diffusion_rtb.evaluation.bootstrap import bootstrap_interval, resampled_counts
from diffusion_rtb.evaluation.metrics.diversity import mean_pairwise_cosine_distance, vendi_score

numbers = st.floats(-50, 50, allow_nan=False, width=32)
vectors = st.lists(numbers, min_size=1, max_size=12)


def float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian_chain(n: int = 200_000, shift: float = 0.4) -> dict[str, Tensor]:
    """One-step 'chains' x ~ q = N(shift, 1) against the prior p = N(0, 1) with r(x) = x."""
    x = shift + torch.randn(n, 1, dtype=torch.float64)
    return {"reward": x[:, 0], "log_q": Normal(shift, 1.0).log_prob(x), "log_p": Normal(0.0, 1.0).log_prob(x)}


def test_gaussian_closed_forms() -> None:
    # With p = N(0, 1) and r = x: log Z = beta²/2 and p* = N(beta, 1).
    beta, shift = 0.7, 0.4
    chain = gaussian_chain(shift=shift)
    kl = float(kl_divergence(Normal(shift, 1.0), Normal(0.0, 1.0)))
    gap = float(kl_divergence(Normal(shift, 1.0), Normal(beta, 1.0)))
    log_w = metrics.log_weights(**chain, beta=beta)
    # Tolerances: four standard errors of 200,000 draws of unit-variance-or-smaller summands.
    assert metrics.kl(chain["log_q"], chain["log_p"]) == pytest.approx(kl, abs=0.01)
    assert metrics.elbo(log_w) == pytest.approx(beta**2 / 2 - gap, abs=0.01)
    assert metrics.log_z_importance(log_w) == pytest.approx(beta**2 / 2, abs=0.01)
    # n·ESS: E[w]²/E[w²] = exp(−(beta − shift)²) for Gaussians of equal variance.
    assert metrics.ess(log_w) == pytest.approx(math.exp(-((beta - shift) ** 2)), abs=0.01)
    prior = torch.randn(200_000, dtype=torch.float64)
    assert metrics.log_z_from_prior(prior, beta) == pytest.approx(beta**2 / 2, abs=0.01)
    assert metrics.reweighted_mean(prior, beta * prior) == pytest.approx(beta, abs=0.02)


def test_exact_posterior_has_equal_weights() -> None:
    beta = 0.7
    chain = gaussian_chain(n=100, shift=beta)
    log_w = metrics.log_weights(**chain, beta=beta)
    torch.testing.assert_close(log_w, torch.full_like(log_w, beta**2 / 2))
    assert metrics.ess(log_w) == pytest.approx(1.0, abs=1e-7)
    # torch.distributions keeps the parameters 0.7 and 1.0 in fp32.
    assert metrics.elbo(log_w) == pytest.approx(beta**2 / 2, abs=1e-7)


def test_log_z_differs_between_prompts() -> None:
    # Weights equal within each prompt, a factor e^10 apart between them: each prompt is exact, the pool is not.
    log_w, prompt = float64([1.0, 1.0, 11.0, 11.0]), torch.tensor([3, 3, 8, 8])
    assert metrics.ess(log_w, prompt) == 1.0
    assert metrics.ess(log_w) < 0.51
    assert metrics.log_z_importance(log_w, prompt) == pytest.approx(6.0)


def test_profile_sums_to_kl() -> None:
    log_q, log_p = torch.randn(5, 7), torch.randn(5, 7)
    profile = metrics.kl_profile(log_q, log_p)
    assert float(profile.sum()) == pytest.approx(metrics.kl(log_q, log_p), abs=1e-12)
    assert profile[2].item() == pytest.approx(sum((log_q - log_p)[:, 2].tolist()) / 5, abs=1e-6)


def test_float32_log_densities_of_image_size_lose_nothing() -> None:
    # Densities near 1e5 nats whose difference is 1: summing them first in fp32 would round to 1/128.
    log_q = torch.full((4, 50), 98_304.0)
    log_p = log_q - 0.0234375
    assert metrics.kl(log_q, log_p) == 50 * 0.0234375


@given(vectors)
def test_ess_is_a_share(values: list[float]) -> None:
    assert 0.0 < metrics.ess(float64(values)) <= 1.0
    w = [math.exp(v - max(values)) for v in values]
    expected = sum(w) ** 2 / (len(w) * sum(v * v for v in w))
    assert metrics.ess(float64(values)) == pytest.approx(expected)


@given(numbers, st.integers(1, 20))
def test_ess_of_equal_weights_is_one(value: float, n: int) -> None:
    assert metrics.ess(torch.full((n,), value)) == 1.0


@given(vectors, st.floats(0.01, 5))
def test_unequal_weights_lower_ess(values: list[float], more: float) -> None:
    assert metrics.ess(float64([*values, max(values) + more])) < 1.0


@given(vectors, numbers)
def test_weights_have_no_scale_and_no_order(values: list[float], shift: float) -> None:
    log_w = float64(values)
    shuffled = log_w.flip(0)
    assert metrics.ess(log_w + shift) == pytest.approx(metrics.ess(log_w), rel=1e-9)
    assert metrics.log_z_importance(log_w + shift) == pytest.approx(metrics.log_z_importance(log_w) + shift, abs=1e-9)
    assert metrics.ess(shuffled) == pytest.approx(metrics.ess(log_w), rel=1e-12)
    assert metrics.log_z_importance(shuffled) == pytest.approx(metrics.log_z_importance(log_w), abs=1e-9)


@given(vectors)
def test_elbo_bounds_log_z(values: list[float]) -> None:
    bound = metrics.elbo(float64(values))
    assert bound <= metrics.log_z_importance(float64(values)) + 1e-9
    assert bound == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_standard_error_is_that_of_stratified_means() -> None:
    values, prompt = float64([1.0, 3.0, 10.0, 14.0, 18.0]), torch.tensor([0, 0, 1, 1, 1])
    # Variances 2 and 16 over 2 and 3 samples, two prompts.
    assert metrics.standard_error(values, prompt) == pytest.approx(math.sqrt(2 / 2 + 16 / 3) / 2)
    assert metrics.standard_error(values) == pytest.approx(float(values.std()) / math.sqrt(5))
    assert math.isnan(metrics.standard_error(values, torch.arange(5)))


@pytest.mark.parametrize(("values", "message"), [([], "got none"), ([0.0, math.nan], r"NaN at rows \[1\]")])
def test_meaningless_input_is_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.ess(float64(values))


shares = st.lists(st.floats(0.001, 1), min_size=3, max_size=3).map(lambda v: float64(v) / sum(v))


@given(shares, shares)
def test_total_variation_is_a_distance(p: Tensor, q: Tensor) -> None:
    tv = metrics.total_variation(p, q)
    assert 0.0 <= tv <= 1.0
    assert tv == metrics.total_variation(q, p)
    assert metrics.total_variation(p, p) == 0.0
    # The largest difference in probability of any event.
    events = [sum(float(p[i] - q[i]) for i in range(3) if mask >> i & 1) for mask in range(8)]
    assert tv == pytest.approx(max(events), abs=1e-9)


def test_total_variation_literals() -> None:
    assert metrics.total_variation(float64([1, 0]), float64([0, 1])) == 1.0
    assert metrics.total_variation(float64([0.5, 0.5]), float64([0.75, 0.25])) == 0.25
    with pytest.raises(ValueError, match="p must be non-negative and sum to 1"):
        metrics.total_variation(float64([2, 1]), float64([0.5, 0.5]))


def test_reweighted_shares_literals() -> None:
    labels, prompt = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([5, 5, 5, 9, 9])
    log_w = float64([math.log(2.0), 0.0, 0.0, 700.0, 700.0 + math.log(3.0)])
    found = metrics.reweighted_shares(labels, 3, log_w, prompt)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.0, 0.25]], dtype=torch.float64))
    raw = metrics.reweighted_shares(labels, 3, None, prompt)
    torch.testing.assert_close(raw, torch.tensor([[1 / 3, 2 / 3, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"0 … 1, got 0 … 2"):
        metrics.reweighted_shares(labels, 2, log_w, prompt)


@pytest.mark.parametrize(("n", "k", "d"), [(12, 3, 5), (12, 3, 40), (8, 8, 8), (6, 1, 4)])
def test_vendi_counts_groups_of_identical_pictures(n: int, k: int, d: int) -> None:
    embeddings = 7.0 * torch.eye(d)[torch.arange(n) % k]
    assert vendi_score(embeddings) == pytest.approx(k)
    # Pairs in different groups are at distance 1.
    apart = (n * n - k * (n // k) ** 2) / (n * (n - 1))
    assert mean_pairwise_cosine_distance(embeddings) == pytest.approx(apart, abs=1e-12)


def test_vendi_is_the_exponential_entropy_of_weighted_groups() -> None:
    p = float64([0.5, 0.3, 0.2])
    assert vendi_score(torch.eye(3), p) == pytest.approx(float(Categorical(p).entropy().exp()))
    # Two copies of one picture with weight 0.15 each count as one with 0.3.
    split = torch.eye(3)[[0, 1, 1, 2]]
    assert vendi_score(split, float64([0.5, 0.15, 0.15, 0.2])) == pytest.approx(vendi_score(torch.eye(3), p))


def test_diversity_against_plain_loops() -> None:
    e, w = torch.randn(6, 4), torch.rand(6)
    cosine = [[float(torch.cosine_similarity(e[i], e[j], dim=0)) for j in range(6)] for i in range(6)]
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    plain = sum(1 - cosine[i][j] for i, j in pairs) / len(pairs)
    weighted = sum(float(w[i] * w[j]) * (1 - cosine[i][j]) for i, j in pairs) / sum(
        float(w[i] * w[j]) for i, j in pairs
    )
    assert mean_pairwise_cosine_distance(e) == pytest.approx(plain, abs=1e-6)
    assert mean_pairwise_cosine_distance(e, w) == pytest.approx(weighted, abs=1e-6)
    eigenvalues = torch.linalg.eigvals(torch.tensor(cosine) / 6).real.clamp_min(1e-12)
    assert vendi_score(e) == pytest.approx(math.exp(-sum(v * math.log(v) for v in eigenvalues.tolist())), rel=1e-4)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 1000))
def test_diversity_is_bounded_and_has_no_order(n: int, d: int, seed: int) -> None:
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert 1.0 - 1e-9 <= vendi_score(e) <= n + 1e-9
    assert 0.0 <= mean_pairwise_cosine_distance(e) <= 2.0
    assert vendi_score(e.flip(0) * 3) == pytest.approx(vendi_score(e))
    assert mean_pairwise_cosine_distance(e.flip(0) * 3) == pytest.approx(mean_pairwise_cosine_distance(e), abs=1e-12)


@pytest.mark.parametrize("statistic", [vendi_score, mean_pairwise_cosine_distance])
def test_embeddings_without_direction_are_refused(statistic: object) -> None:
    with pytest.raises(ValueError, match="finite and non-zero"):
        statistic(torch.zeros(3, 2))  # type: ignore[operator]
    with pytest.raises(ValueError, match="2 non-negative numbers"):
        statistic(torch.ones(2, 2), torch.tensor([1.0, -1.0]))  # type: ignore[operator]


def test_one_picture_has_no_distance() -> None:
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        mean_pairwise_cosine_distance(torch.ones(1, 2))
    assert mean_pairwise_cosine_distance(torch.eye(2), torch.tensor([1.0, 0.0])) == 0.0


def test_interval_is_that_of_the_normal_theory() -> None:
    values = torch.randn(400, dtype=torch.float64)
    found = bootstrap_interval(values, 0.95, 4000)
    half = 1.96 * float(values.std()) / 20
    # 4,000 replicates place a 2.5 % quantile within about 3 % of its distance from the mean.
    assert found.mean == float(values.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.07 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.07 * half)


def test_interval_ignores_differences_between_prompts() -> None:
    values, groups = float64([0.0, 0.0, 100.0, 100.0, 100.0]), torch.tensor([0, 0, 1, 1, 1])
    found = bootstrap_interval(values, groups=groups)
    assert (found.low, found.mean, found.high) == (50.0, 50.0, 50.0)
    assert bootstrap_interval(values).low < 50.0


def test_interval_covers_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        found = bootstrap_interval(torch.randn(50), 0.9, 300, seed=seed)
        hits += found.low <= 0.0 <= found.high
    # 200 trials of probability 0.9 have a standard deviation of 4; the bootstrap at n = 50 is 1 % short.
    assert 164 <= hits <= 194


def test_interval_repeats_and_leaves_global_randomness_alone() -> None:
    values = torch.arange(9.0)
    state = torch.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_resamplings_keep_their_size() -> None:
    counts = resampled_counts(7, 50, torch.Generator().manual_seed(0))
    assert torch.equal(counts.sum(1), torch.full((50,), 7.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("confidence", "n", "message"),
    [(1.0, 10, "between 0 and 1, e.g. 0.95, got 1.0"), (0.9, 0, "at least 1, got 0")],
)
def test_bootstrap_arguments_are_checked(confidence: float, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(torch.ones(3), confidence, n)
