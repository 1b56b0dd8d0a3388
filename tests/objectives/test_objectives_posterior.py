"""Objectives at the closed-form posterior of linear-Gaussian chains, on average, and on the way there.

Tolerances: everything runs in float64 (unit roundoff 1e-16); sums of fewer than 1e3 terms of size S are good to 1e-12·S, so
`close` (1e-9) leaves three digits. Where another number is used its comment says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL, trust_pcl_residual
from tests.oracles.terms import at, betas, cases, close, cotangent, make_terms, seeds


@dataclass
class Chain:
    """x_s = A_t x_t + b_t + std_t z, with log F(x_t) = log E[exp(beta r(x_0)) | x_t] = -1/2 x'Px + h'x + c, by recursion.

    r(x) = -1/2 x'Hx + g'x. With A_0 = 0 (memoryless) log F(x_T) is the constant log Z.
    """

    A: Tensor
    b: Tensor
    std: Tensor
    H: Tensor
    g: Tensor
    beta: float

    @staticmethod
    def random(seed: int, dim: int, steps: int, beta: float, *, memoryless: bool) -> Chain:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        A, root = 0.5 * draw(steps, dim, dim), draw(dim, dim)
        if memoryless:
            A[0] = 0
        return Chain(A, draw(steps, dim), 0.3 + draw(steps).abs(), root @ root.T / dim, draw(dim), beta)

    @property
    def steps(self) -> int:
        return len(self.std)

    def reward(self, x: Tensor) -> Tensor:
        return -0.5 * torch.einsum("bi,ij,bj->b", x, self.H, x) + x @ self.g

    def log_f(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(P, h, c) of every state, x_T first."""
        P, h, c = self.beta * self.H, self.beta * self.g, torch.zeros((), dtype=torch.float64)
        found = [(P, h, c)]
        eye = torch.eye(len(self.g), dtype=torch.float64)
        for A, b, std in zip(self.A.flip(0), self.b.flip(0), self.std.flip(0), strict=True):
            precision = eye / std**2 + P
            cov = torch.linalg.inv(precision)
            M, k = eye / std**2 - cov / std**4, cov @ h / std**2
            c = c - len(b) * std.log() - 0.5 * torch.logdet(precision) + 0.5 * h @ cov @ h - 0.5 * b @ M @ b + k @ b
            P, h = A.T @ M @ A, A.T @ (k - M @ b)
            found.append((P, h, c))
        return found[::-1]

    def value(self, x: Tensor, i: int) -> Tensor:
        """V(x_i) = log F / beta."""
        P, h, c = self.log_f()[i]
        return (-0.5 * torch.einsum("bi,ij,bj->b", x, P, x) + x @ h + c) / self.beta

    def log_densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log_q of the optimal transitions, ∝ p(x_s | x_t) F(x_s), and log_p; by torch.distributions."""
        log_q, log_p = [], []
        eye = torch.eye(len(self.g), dtype=torch.float64)
        for i, (P, h, _) in enumerate(self.log_f()[1:]):
            mean, std = x[:, i] @ self.A[i].T + self.b[i], self.std[i]
            precision = eye / std**2 + P
            optimal = torch.linalg.solve(precision, mean.T / std**2 + h[:, None]).T
            log_q.append(MultivariateNormal(optimal, precision_matrix=precision).log_prob(x[:, i + 1]))
            log_p.append(Normal(mean, std).log_prob(x[:, i + 1]).sum(dim=1))
        return torch.stack(log_q, dim=1), torch.stack(log_p, dim=1)

    def terms(self, x: Tensor) -> Terms:
        return make_terms(*self.log_densities(x), self.reward(x[:, -1]), x=x)


class ClosedForm(nn.Module):
    """The chain's own V in the place of a value network; timesteps count down from `steps`."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        value = torch.zeros(len(x), dtype=x.dtype)
        for i in range(self.chain.steps):
            value = torch.where(t == self.chain.steps - i, self.chain.value(x, i), value)
        return value


def scale_of(terms: Terms, beta: float) -> float:
    """The largest sum of magnitudes that a residual cancels: rounding errors are proportional to it."""
    return float((terms.log_q.detach().abs().sum(1) + terms.log_p.abs().sum(1) + beta * terms.reward.abs()).max()) + 1


def arbitrary_trajectories(seed: int, chain: Chain) -> Tensor:
    """Drawn by nobody: the balance holds on every trajectory, not only on likely ones."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(5, chain.steps + 1, len(chain.g), generator=generator, dtype=torch.float64)


@cases
@given(seeds, st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6]), betas)
def test_rtb_vanishes_at_the_closed_form_posterior(seed: int, dim: int, steps: int, beta: float) -> None:
    chain = Chain.random(seed, dim, steps, beta, memoryless=True)
    terms = chain.terms(arbitrary_trajectories(seed, chain))
    log_z = chain.log_f()[0][2]
    tolerance = 1e-11 * scale_of(terms, beta)  # float64 through the inverses of small well-conditioned matrices
    exact = at(RTB("learned"), [float(log_z)])(terms, beta)
    assert exact.residual.abs().max() < tolerance
    estimated = RTB("vargrad")(terms, beta)
    assert estimated.residual.abs().max() < tolerance
    assert (estimated.log_z - log_z).abs().max() < tolerance


@cases
@given(seeds, st.integers(1, 3), st.sampled_from([1, 2, 4, 6]), betas, st.booleans())
def test_stretches_vanish_at_the_closed_form_value(
    seed: int, dim: int, steps: int, beta: float, memoryless: bool
) -> None:
    """For every length that divides the trajectory, and without memorylessness: V may depend on x_T."""
    chain = Chain.random(seed, dim, steps, beta, memoryless=memoryless)
    terms = chain.terms(arbitrary_trajectories(seed, chain))
    tolerance = 1e-11 * scale_of(terms, beta)
    for length in (d for d in range(1, steps + 1) if steps % d == 0):
        objective = TrustPCL(length)
        objective.value = ClosedForm(chain)
        answer = objective(terms, beta)
        values = objective.boundary_values(terms, beta)
        stretches = trust_pcl_residual(terms.log_q, terms.log_p, values, beta)
        assert stretches.shape == (5, steps // length)
        assert stretches.abs().max() < tolerance * (1 + 1 / beta)
        assert answer.residual.abs().max() < tolerance * (1 + beta)


def test_a_chain_with_memory_defeats_a_scalar_log_z() -> None:
    """The residual of the true posterior spreads as log F(x_T) does: what length = steps is for."""
    chain = Chain.random(3, 2, 1, 2.0, memoryless=False)
    terms = chain.terms(arbitrary_trajectories(3, chain))
    log_f = 2.0 * chain.value(terms.x[:, 0], 0)
    close(RTB()(terms, 2.0).residual, log_f.mean() - log_f)
    assert (log_f - log_f.mean()).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_log_z_of_the_chain_is_its_integral(seed: int) -> None:
    """log Z against quadrature of the prior's marginal of x_0 (Normal), so that the recursion above is itself checked."""
    chain = Chain.random(seed, 1, 3, 1.5, memoryless=True)
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for A, b, std in zip(chain.A[:, 0], chain.b, chain.std, strict=True):
        mean, variance = A * mean + b, A**2 * variance + std**2
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    log_density = Normal(mean, variance.sqrt()).log_prob(x) + 1.5 * chain.reward(x[:, None])
    # The trapezoid rule converges faster than any power of the spacing for a Gaussian that vanishes at both ends.
    close(chain.log_f()[0][2], torch.log(torch.trapezoid(log_density.exp(), x)))


@pytest.mark.parametrize("objective", [at(RTB("learned"), [3.7]), at(RTB("learned"), [-1.0]), RTB("vargrad")])
def test_on_policy_gradient_is_the_gradient_of_kl(objective: RTB) -> None:
    """E[residual grad log q] = grad KL(q || p exp(beta r) / Z), whatever log Z: within 5 standard errors of 200,000 draws."""
    beta, samples = 2.0, 200_000
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    posterior = Normal(beta * 1.5 / (1 + beta), (1 + beta) ** -0.5)  # prior N(0, 1), r = -1/2 (x - 1.5)²
    exact = torch.autograd.grad(kl_divergence(Normal(mean, log_std.exp()), posterior), [mean, log_std])

    x = (mean + log_std.exp() * torch.randn(samples, dtype=torch.float64)).detach()
    log_q = Normal(mean.detach(), log_std.detach().exp()).log_prob(x)[:, None]
    log_p = Normal(0.0, 1.0).log_prob(x)[:, None]
    weights = samples * cotangent(objective, make_terms(log_q, log_p, -0.5 * (x - 1.5) ** 2), beta)[:, 0]
    z = (x - mean.detach()) / log_std.detach().exp()
    for score, expected in zip([z / log_std.detach().exp(), z**2 - 1], exact, strict=True):
        gradient = weights * score
        assert (gradient.mean() - expected).abs() < 5 * gradient.std() / math.sqrt(samples)


class Learner(nn.Module):
    """q for a memoryless chain of two steps in one dimension: x_1 ~ N(m, s), x_0 ~ N(a x_1 + b, s')."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def log_q(self, x: Tensor) -> Tensor:
        mean = torch.stack([self.mean[0].expand(len(x)), self.slope * x[:, 1, 0] + self.mean[1]], dim=1)
        return Normal(mean, self.log_std.exp()).log_prob(x[:, 1:, 0])


class Quadratic(nn.Module):
    """V(x, t) = -1/2 P x² + h x + c with its own numbers at each t: the form the closed V has."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        P, h, c = self.coefficients[2 - t.long()].unbind(dim=1)
        return -0.5 * P * x[:, 0] ** 2 + h * x[:, 0] + c


def stretches_of_one() -> TrustPCL:
    objective = TrustPCL(1)
    objective.value = Quadratic()
    return objective


@pytest.mark.parametrize(
    "build",
    [RTB, partial(RTB, "learned"), partial(RTB, "per_prompt", "huber"), TrustPCL, stretches_of_one],
    ids=["vargrad", "learned", "per_prompt-huber", "trust_pcl", "stretches"],
)
def test_descent_finds_the_posterior(build: Any) -> None:
    """Off-policy, on trajectories wider than the prior, to the closed-form transitions and log Z.

    The residual vanishes on every trajectory at the optimum, so the stochastic gradient has no noise there and Adam
    converges linearly: 600 steps at a rate falling to 0 were seen to reach 1e-6 or better in each case.
    """
    chain = Chain.random(5, 1, 2, 1.0, memoryless=True)
    objective, learner = build(), Learner()
    if objective.state_dict().keys() != {"value.coefficients"}:
        objective.prepare(1, (1,), 3)
    objective.double()
    optimizer = torch.optim.Adam([*learner.parameters(), *objective.parameters()], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        x = 1.5 * torch.randn(64, 3, 1, dtype=torch.float64)
        log_q, (_, log_p) = learner.log_q(x), chain.log_densities(x)
        terms = make_terms(log_q, log_p, chain.reward(x[:, -1]), x=x)
        optimizer.zero_grad()
        answer = objective(terms, chain.beta)
        answer.loss.backward()  # fills log_q.grad, the cotangent, and the objective's own gradients
        log_q.backward(terms.log_q.grad)
        optimizer.step()
        schedule.step()
    x = arbitrary_trajectories(0, chain)
    assert_close(learner.log_q(x), chain.log_densities(x)[0], rtol=1e-4, atol=1e-4)
    assert_close(answer.log_z, chain.log_f()[0][2].expand(64), rtol=1e-4, atol=1e-4)
