"""What a comparison measures: the exact targets it asks pipelines for, mode weights, W2, and all numbers of a sampler together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.testing import assert_close

from diffusion_rtb.comparison.truths.measure import draw_posterior, look, measured, mode_distance, mode_shares
from diffusion_rtb.comparison.truths.transport import block_distances, floor, wasserstein
from diffusion_rtb.config.components import build
from diffusion_rtb.exact import Modes, exact_target
from pipelines.gaussian import Gaussian
from pipelines.gmm import GMM
from rewards.density import Density
from tests.oracles.pixel import PixelPrior

MEANS = [[-2.0, 1.0], [2.0, 0.0]]
RATIO: dict[str, Any] = {
    "density": {"means": MEANS, "variance": 0.3, "weights": [0.85, 0.15]},
    "minus": {"means": MEANS, "variance": 0.3, "weights": [0.4, 0.6]},
}
REWARD = {"component": "density", **RATIO}
QUADRATIC: dict[str, Any] = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}


def mixture_prior(steps: int = 40) -> GMM:
    made = GMM(MEANS, [0.4, 0.6], 0.3, steps=steps, width=16, layers=2, frequencies=3)
    made.attach(seed=0)
    return made


def gaussian_prior() -> Gaussian:
    made = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=20)
    made.attach()
    return made


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mixtures_target_is_prior_times_exp_of_the_reward() -> None:
    made = mixture_prior()
    target = exact_target(made, Density(**RATIO), 1.0)
    x = 3 * torch.randn(50, 2, dtype=torch.float64)
    assert target.log_density is not None
    expected = made.mixture.log_prob(x) + Density(**RATIO)(x, [""] * 50) - target.log_z
    assert_close(target.log_density(x), expected, rtol=1e-9, atol=1e-9)


def test_the_mixtures_samples_modes_and_exact_denoiser_agree() -> None:
    made = mixture_prior()
    target = exact_target(made, Density(**RATIO), 1.0)
    assert target.modes is not None
    # 4,000 samples: a standard error of 0.006 for a share of 0.15.
    shares = mode_shares(target.sample(4000, generator()), target.modes)
    assert_close(shares, torch.tensor([0.85, 0.15, 0.0], dtype=torch.float64), rtol=0, atol=0.025)
    x, drawn = draw_posterior(made, Density(**RATIO), [""], 2000, 0, truth=target)
    assert mode_distance(mode_shares(x, target.modes), target.modes) < 0.04
    # log Z = 0, which 40 steps of fixed variance miss by 0.12 nats.
    assert -0.2 < look(x, drawn, target, 1.0)["elbo"] < 0.02
    # Afterwards the network is the untrained posterior again, which is the prior.
    x, drawn = draw_posterior(made, Density(**RATIO), [""], 2000, 0)
    assert mode_shares(x, target.modes)[1] == pytest.approx(0.6, abs=0.05)
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    assert torch.equal(drawn.log_q, drawn.log_p)


def test_the_gaussians_target_is_the_chains_posterior() -> None:
    made = gaussian_prior()
    tilt = made.solve(1.0, **QUADRATIC)
    target = exact_target(made, Density(QUADRATIC), 1.0)
    assert target.log_z == tilt.log_z
    assert target.modes is None
    mean, cov = made.in_data_units(*tilt.end)
    x = target.sample(20_000, generator())
    # Standard errors of 0.005 for means, 0.004 for covariances.
    assert_close(x.mean(0), mean, rtol=0, atol=0.025)
    assert_close(x.T.cov(), cov, rtol=0, atol=0.025)
    reward = Density(QUADRATIC)
    x, drawn = draw_posterior(made, reward, [""], 4000, 0, truth=target)
    seen = look(x, drawn, target, 1.0)
    assert seen.keys() == {"elbo", "kl", "reward"}
    assert seen["elbo"] == pytest.approx(tilt.best_elbo, abs=0.05)
    assert seen["reward"] - seen["kl"] == pytest.approx(seen["elbo"], abs=1e-9)
    assert all(not bool(parameter.any()) for parameter in made.parameters().values())


def test_a_gaussian_written_as_a_density_is_the_same_target() -> None:
    made, C = gaussian_prior(), torch.tensor([[1.0, 0.2], [0.2, 0.7]], dtype=torch.float64)
    normal: dict[str, Any] = {"mean": [0.5, -1.0], "covariance": C.tolist()}
    found = exact_target(made, Density(normal), 1.0)
    constant = float(torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), C).log_prob(C[0] * 0))
    same = {"mean": [0.5, -1.0], "precision": torch.linalg.inv(C).tolist(), "constant": constant}
    assert found.log_z == pytest.approx(made.solve(1.0, **same).log_z, rel=1e-9)


@pytest.mark.parametrize(
    ("reward", "beta", "message"),
    [
        ({"component": "jpeg"}, 1.0, "not known in closed form: the reward Jpeg is no ratio"),
        (REWARD, 2.0, "beta is 2 instead of 1"),
        (REWARD | {"minus": None}, 1.0, "no ratio of two densities"),
        (REWARD | {"minus": RATIO["density"]}, 1.0, "`minus` has other weights"),
        (
            REWARD | {"density": RATIO["density"] | {"variance": 0.4}},
            1.0,
            "density.variance is 0.4, the prior's is 0.3",
        ),
        (REWARD | {"density": RATIO["density"] | {"means": [[0.0, 0.0], [2.0, 0.0]]}}, 1.0, "no mode of the prior"),
    ],
)
def test_posteriors_that_nobody_knows_are_refused(reward: dict[str, Any], beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_target(mixture_prior(4), build(reward, "reward"), beta)


def test_the_gaussian_refuses_other_rewards() -> None:
    with pytest.raises(ValueError, match="not known in closed form for the reward Density"):
        exact_target(gaussian_prior(), Density(**RATIO), 1.0)


def test_a_prior_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PixelPrior has no exact target.*exact_target"):
        exact_target(PixelPrior(), Density(**RATIO), 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 3))
def test_shares_are_counted_one_by_one(seed: int, count: int, dim: int) -> None:
    draw = generator(seed)
    centres = 5 * torch.randn(count, dim, generator=draw, dtype=torch.float64)
    modes = Modes(centres, torch.full((count,), 1 / count, dtype=torch.float64), 0.5)
    x = 5 * torch.randn(40, dim, generator=draw, dtype=torch.float64)
    expected = [0] * (count + 1)
    for point in x:
        distances = [math.dist(point.tolist(), centre.tolist()) for centre in centres]
        nearest = min(range(count), key=distances.__getitem__)
        expected[nearest if distances[nearest] <= 4 * 0.5 else count] += 1
    assert_close(mode_shares(x, modes), torch.tensor(expected, dtype=torch.float64) / 40)


def test_what_is_off_counts_as_wrong() -> None:
    modes = Modes(torch.tensor([[0.0], [10.0]]), torch.tensor([0.5, 0.5]), 1.0)
    x = torch.tensor([[0.0], [0.1], [5.0], [10.0]])
    shares = mode_shares(x, modes)
    assert shares.tolist() == [0.5, 0.25, 0.25]
    assert mode_distance(shares, modes) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="cannot be counted"):
        mode_shares(torch.zeros(3, 2), modes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 4))
def test_w2_is_that_of_the_best_assignment(seed: int, count: int, dim: int) -> None:
    draw = generator(seed)
    x, y = (torch.randn(count, dim, generator=draw, dtype=torch.float64) for _ in range(2))
    cost = (x[:, None] - y).square().sum(2)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert wasserstein(x, y) == pytest.approx(math.sqrt(float(cost[rows, columns].mean())), abs=1e-9)


def test_w2_of_a_shift_is_its_length() -> None:
    x = torch.randn(200, 3)
    assert wasserstein(x, x + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(3.0, rel=1e-6)
    assert wasserstein(x, x.flip(0)) == pytest.approx(0.0, abs=1e-6)


def test_distances_are_means_over_whole_blocks_and_share_their_exact_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_rtb.comparison.truths.transport.BLOCK", 50)

    def normal(count: int, draw: torch.Generator) -> Tensor:
        return torch.randn(count, 2, generator=draw, dtype=torch.float64)

    x = normal(170, generator(5))
    found = block_distances(x, normal)
    first = block_distances(x[:50], normal)
    assert first.standard_error is None
    assert first.mean != block_distances(x[50:100], normal).mean
    assert found.mean == block_distances(x[:150], normal).mean
    assert found.standard_error is not None
    # A perfect sampler is at the floor, a shifted one above it by the shift, but for the noise that stays.
    exact, shifted = floor(1000, normal), block_distances(normal(1000, generator(6)) + 3, normal)
    assert block_distances(normal(1000, generator(7)), normal).mean == pytest.approx(exact.mean, rel=0.2)
    assert shifted.mean == pytest.approx(math.hypot(3 * math.sqrt(2), exact.mean), rel=0.05)
    assert floor(1000, normal) == exact
    with pytest.raises(ValueError, match="at least one sample"):
        block_distances(x[:0], normal)


def test_the_numbers_of_the_untrained_posterior_are_the_priors() -> None:
    made = gaussian_prior()
    target = exact_target(made, Density(QUADRATIC), 1.0)
    x, drawn = draw_posterior(made, Density(QUADRATIC), [""], 1000, 0)
    numbers = measured(x, drawn, target, 1.0)
    assert not {"tv", "off", "shares"} & numbers.keys()
    assert numbers["kl"] == 0.0
    assert numbers["strength"] == 0.0
    assert numbers["r2"] is None
    # Importance sampling from the prior: the ELBO is its mean reward, log Z comes from exp(beta·r).
    assert numbers["elbo"] == pytest.approx(float(drawn.reward.double().mean()), rel=1e-9)
    assert numbers["log_z"] == pytest.approx(target.log_z, abs=0.2)
    weights = drawn.reward.double().exp()
    assert numbers["ess"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 1000), rel=1e-6)
    assert numbers["samples"] == 1000
    # N(mean, C) against N(m*, C*): W2² >= |mean - m*|².
    mean, _ = made.in_data_units(*made.solve(1.0, **QUADRATIC).end)
    assert numbers["w2"] > float((mean - torch.tensor([1.0, -2.0], dtype=torch.float64)).norm())


def test_samples_do_not_depend_on_batches_and_scoring_fewer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, reward = gaussian_prior(), Density(QUADRATIC)
    x, drawn = draw_posterior(made, reward, ["", "other"], 30, 3)
    monkeypatch.setattr("diffusion_rtb.comparison.truths.measure.BATCH", 8)
    again, few = draw_posterior(made, reward, ["", "other"], 30, 3, scored=11)
    assert_close(again, x, rtol=1e-5, atol=1e-5)
    assert len(few) == 11
    assert few.prompt.tolist() == [0, 1] * 5 + [0]
    assert few.log_p is not None
    assert drawn.log_p is not None
    assert_close(few.log_p, drawn.log_p[:11], rtol=1e-5, atol=1e-4)
