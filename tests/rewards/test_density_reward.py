"""Log-densities as rewards: against `torch.distributions`, and against the posteriors they must lead to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from diffusion_rtb.config.components import build, describe
from rewards.density import Density

GRID = [[float(a), float(b)] for a in (-10, -5, 0, 5, 10) for b in (-10, -5, 0, 5, 10)]
MODES = [
    [-10.0, -5.0],
    [-5.0, -10.0],
    [-5.0, 0.0],
    [10.0, -5.0],
    [0.0, 0.0],
    [0.0, 5.0],
    [5.0, -5.0],
    [5.0, 0.0],
    [5.0, 10.0],
]
SHARES = [w / 61 for w in (4, 10, 4, 5, 10, 5, 4, 15, 4)]


def ring(x: Tensor) -> Tensor:
    """A user's own log-density, up to its normaliser."""
    return -(x.norm(dim=1) - 2).square()


student = torch.distributions.Independent(torch.distributions.StudentT(torch.full((2,), 3.0, dtype=torch.float64)), 1)

not_callable = 3.0


def of(density: Any, x: Tensor, **arguments: Any) -> Tensor:
    return build({"component": "density", "density": density, **arguments}, "reward")(x, [""] * len(x))


def mixture(means: Sequence[Sequence[float]], variance: Any, weights: Sequence[float]) -> MixtureSameFamily:
    m = torch.tensor(means, dtype=torch.float64)
    std = torch.as_tensor(variance, dtype=torch.float64).expand(len(m)).sqrt()
    parts = Independent(Normal(m, std[:, None].expand_as(m)), 1)
    return MixtureSameFamily(Categorical(torch.tensor(weights, dtype=torch.float64)), parts)


def positive_definite(dim: int, seed: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_mixture(dim: int, count: int, seed: int, own: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    means = (10 * torch.randn(count, dim, generator=generator)).tolist()
    variance: Any = (0.1 + torch.rand(count, generator=generator)).tolist() if own else 0.3
    weights = torch.rand(count, generator=generator).double() + 0.01
    weights /= weights.sum()
    x = 10 * torch.randn(7, dim, generator=generator, dtype=torch.float64)
    expected = mixture(means, variance, weights.tolist()).log_prob(x)
    found = of({"means": means, "variance": variance, "weights": weights.tolist()}, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["matrix", "diagonal", "number"])
def test_gaussian(kind: str) -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    matrix = {
        "matrix": positive_definite(3, 0),
        "diagonal": torch.diag(torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)),
        "number": 0.7 * torch.eye(3, dtype=torch.float64),
    }[kind]
    given: Any = {"matrix": matrix.tolist(), "diagonal": matrix.diagonal().tolist(), "number": 0.7}[kind]
    x = 3 * torch.randn(9, 3, dtype=torch.float64)
    expected = MultivariateNormal(mean, matrix).log_prob(x)
    torch.testing.assert_close(of({"mean": mean.tolist(), "covariance": given}, x), expected, rtol=1e-10, atol=1e-10)


def test_quadratic_is_the_gaussian_up_to_its_normaliser() -> None:
    mean, precision = torch.tensor([1.0, -2.0], dtype=torch.float64), positive_definite(2, 1)
    x = torch.randn(9, 2, dtype=torch.float64)
    target = MultivariateNormal(mean, precision_matrix=precision)
    form = {"mean": mean.tolist(), "precision": precision.tolist(), "constant": float(target.log_prob(mean))}
    torch.testing.assert_close(of(form, x), target.log_prob(x), rtol=1e-10, atol=1e-10)


def test_linear() -> None:
    x = torch.randn(9, 2, dtype=torch.float64)
    a = torch.tensor([0.5, -3.0], dtype=torch.float64)
    torch.testing.assert_close(of({"linear": a.tolist(), "constant": 2.0}, x), 2.0 + x @ a)
    both = {"linear": a.tolist(), "precision": 2.0, "mean": [0.0, 1.0]}
    centre = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(of(both, x), x @ a - (x - centre).square().sum(1))


def test_a_gaussian_prior_times_exp_of_a_quadratic_is_the_conjugate_posterior() -> None:
    """log p + beta·r − log p* is the same number everywhere: log Z."""
    prior = MultivariateNormal(torch.zeros(2, dtype=torch.float64), positive_definite(2, 2))
    m, P, beta = torch.tensor([2.0, 1.0], dtype=torch.float64), positive_definite(2, 3), 0.7
    precision = prior.precision_matrix + beta * P
    posterior = MultivariateNormal(torch.linalg.solve(precision, beta * P @ m), precision_matrix=precision)
    x = 3 * torch.randn(50, 2, dtype=torch.float64)
    log_z = prior.log_prob(x) + beta * of({"mean": m.tolist(), "precision": P.tolist()}, x) - posterior.log_prob(x)
    assert log_z.std() < 1e-10


def test_the_25_gaussians_have_log_z_0_and_the_known_weights() -> None:
    """r = log posterior − log prior: E_prior[exp r] = 1, E_posterior[r] = KL = 1.157 nats, ESS 0.276."""
    prior, posterior = mixture(GRID, 0.3, [1 / 25] * 25), mixture(MODES, 0.3, SHARES)
    torch.manual_seed(0)
    x = prior.sample((40_000,))
    target = {"means": MODES, "variance": 0.3, "weights": SHARES}
    minus = {"means": GRID, "variance": 0.3}
    r = of(target, x, minus=minus)
    torch.testing.assert_close(r, posterior.log_prob(x) - prior.log_prob(x), rtol=1e-9, atol=1e-9)
    weight = r.exp()
    assert weight.mean() == pytest.approx(1.0, abs=4 * float(weight.std()) / 200)
    assert weight.mean() ** 2 / weight.square().mean() == pytest.approx(0.276, abs=0.01)
    y = posterior.sample((40_000,))
    assert of(target, y, minus=minus).mean() == pytest.approx(1.157, abs=0.02)
    near = torch.cdist(x, torch.tensor(MODES, dtype=torch.float64)) < 4 * math.sqrt(0.3)
    shares = (weight[:, None] * near).sum(0) / weight.sum()
    torch.testing.assert_close(shares, torch.tensor(SHARES, dtype=torch.float64), rtol=0, atol=0.01)


def test_a_function_or_a_distribution_of_ones_own() -> None:
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(of(f"{__name__}:ring", x), ring(x))
    torch.testing.assert_close(of(f"{__name__}:student", x), student.log_prob(x))
    both = of(f"{__name__}:ring", x, minus={"mean": [0.0, 0.0], "covariance": 1.0})
    torch.testing.assert_close(both, ring(x) + x.square().sum(1) / 2 + math.log(2 * math.pi))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_have_the_samples_precision_and_are_computed_in_float64(dtype: torch.dtype) -> None:
    density = {"means": GRID, "variance": 0.3}
    x = (10 * torch.randn(20, 2)).to(dtype)
    found = of(density, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, mixture(GRID, 0.3, [1 / 25] * 25).log_prob(x.double()).to(dtype))


def test_gradients() -> None:
    forms: list[Any] = [
        {"means": MODES, "variance": 3.0, "weights": SHARES},
        {"mean": [1.0, 2.0], "covariance": [[1.0, 0.5], [0.5, 2.0]]},
        {"mean": [1.0, 2.0], "precision": [1.0, 0.0], "linear": [0.0, 1.0]},
    ]
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for form in forms:
        reward = Density(form, minus={"means": GRID, "variance": 5.0})
        assert torch.autograd.gradcheck(lambda y, r=reward: r(y, [""] * 4), x)


def test_other_shapes_are_flattened() -> None:
    images = torch.rand(3, 3, 2, 2)
    expected = Normal(0.5, 2.0).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(of({"mean": [0.5] * 12, "covariance": 4.0}, images), expected)


@pytest.mark.parametrize(
    "density, message",
    [
        ({"means": MODES, "variance": 0.3, "weights": [61 * w for w in SHARES]}, r"sum to 61 instead of 1; .*\[0\.065574, 0\.1639"),
        ({"means": MODES, "variance": 0.3, "weights": [1.0]}, "9 means and 1 weights"),
        ({"means": [[0.0], [1.0]], "variance": 0.3, "weights": [1.5, -0.5]}, "every weight must be positive"),
        ({"means": [[0.0], [1.0]], "variance": [0.3, 0.0]}, "every variance must be positive"),
        ({"means": [[0.0], [1.0, 2.0]], "variance": 0.3}, "means is .* lists of equal length"),
        ({"means": [0.0, 1.0], "variance": 0.3}, r"means has the shape \(2,\): it must be a list of lists"),
        ({"means": [[float("nan")]], "variance": 0.3}, "every number must be finite"),
        ({"mean": [0.0, 0.0], "covariance": [[1.0, 2.0], [2.0, 1.0]]}, "has the eigenvalue -1: it must be positive definite"),
        ({"mean": [0.0, 0.0], "covariance": [1.0, 0.0]}, "covariance has the eigenvalue 0"),
        ({"mean": [0.0, 0.0], "covariance": [[1.0, 0.5], [0.0, 1.0]]}, "covariance is not symmetric"),
        ({"mean": [0.0, 0.0], "covariance": [1.0, 1.0, 1.0]}, r"covariance has the shape \(3,\): give a 2 x 2 matrix"),
        ({"mean": [0.0], "precision": -1.0}, "precision has the eigenvalue -1"),
        ({"mean": [0.0], "linear": [0.0, 1.0]}, "mean has 1 numbers and linear 2"),
        ({"mean": [0.0]}, "needs `linear`, or both"),
        ({"means": [[0.0]], "variance": 0.3, "wieghts": [1.0]}, "has no 'wieghts'. It is"),
        ({"means": [[0.0]]}, "lacks 'variance'"),
        ({}, "is empty. It is 'module:function' or one of"),
        ({"linear": ["a"]}, "linear is .*it must be numbers"),
        ("tests.rewards.test_density_reward:rnig", "not 'rnig'.*mean 'ring'"),
        ("tests.rewards.test_density_reward:not_callable", "is of type float: name a function"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameters(density: Any, message: str) -> None:
    for component in ({"density": density}, {"density": {"linear": [1.0]}, "minus": density}):
        with pytest.raises(ValueError, match=message):
            describe({"component": "density", **component}, "reward")
        with pytest.raises(ValueError, match=message):
            Density(**component)


def test_whole_numbers_as_a_config_has_them() -> None:
    x = torch.randn(5, 1, dtype=torch.float64)
    found = of({"means": [[0], [2]], "variance": 1, "weights": [0.5, 0.5]}, x)
    torch.testing.assert_close(found, mixture([[0.0], [2.0]], 1.0, [0.5, 0.5]).log_prob(x))


def test_samples_of_another_dimension() -> None:
    with pytest.raises(ValueError, match="density is over 2 numbers, each sample has 3"):
        of({"means": GRID, "variance": 0.3}, torch.zeros(1, 3))
