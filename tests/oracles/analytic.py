"""Closed forms for the analytic priors, derived another way than in `pipelines`: joint distributions, published formulas, autograd.

Nothing of `pipelines` is used here: a chain is one big Normal, conditioned as a whole, where `pipelines` recurses step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal


def sampler_formula(name: str, alpha_bar: list[float], eta: float = 1.0) -> list[tuple[float, float, float]]:
    """(by_x, by_noise, std) of each step from alpha_bar[-1] on; by the papers, not by asking the scheduler.

    DDIM: Song et al. 2020, https://arxiv.org/abs/2010.02502. DDPM: Ho et al. 2020, https://arxiv.org/abs/2006.11239; its last
    step predicts x_0 itself.
    """
    steps = []
    for t in range(len(alpha_bar) - 1, 0, -1):
        now, then = alpha_bar[t], alpha_bar[t - 1]
        if name == "DDPMScheduler" and t == 1:
            then = 1.0
        variance = (1 - then) / (1 - now) * (1 - now / then)
        if name == "DDPMScheduler":
            alpha = now / then
            steps.append((alpha**-0.5, -(1 - alpha) / math.sqrt((1 - now) * alpha), math.sqrt(variance)))
        else:
            std = eta * math.sqrt(variance)
            by_x = math.sqrt(then / now)
            steps.append((by_x, math.sqrt(1 - then - std**2) - by_x * math.sqrt(1 - now), std))
    return steps


def score_by_autograd(density: torch.distributions.Distribution, x: Tensor) -> Tensor:
    """Gradient of the log-density at each row."""
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    return gradient


def noised_mixture(means: Tensor, weights: Tensor, variance: float, alpha_bar: float) -> MixtureSameFamily:
    """Density of sqrt(alpha_bar)·x + sqrt(1 - alpha_bar)·noise for x from the mixture."""
    std = math.sqrt(alpha_bar * variance + 1 - alpha_bar)
    return MixtureSameFamily(Categorical(weights), Independent(Normal(math.sqrt(alpha_bar) * means, std), 1))


def noised_gaussian(mean: Tensor, cov: Tensor, alpha_bar: float) -> MultivariateNormal:
    """The same for x from a Normal."""
    eye = torch.eye(len(mean), dtype=cov.dtype)
    return MultivariateNormal(math.sqrt(alpha_bar) * mean, alpha_bar * cov + (1 - alpha_bar) * eye)


def log_mean_exp_quadratic(mean: np.ndarray, cov: np.ndarray, H: np.ndarray, g: np.ndarray, c: float) -> float:
    """log E exp(-1/2 x'Hx + g'x + c) for x ~ N(mean, cov), by a change of variables x = mean + R y that makes H diagonal.

    One-dimensional integrals remain: E exp(-d y²/2 + e y) = exp(e² / (2(1 + d))) / sqrt(1 + d) for y ~ N(0, 1).
    """
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(values.clip(0))  # cov = root root', also where there is no noise left
    d, turn = np.linalg.eigh(root.T @ H @ root)
    e = turn.T @ root.T @ (g - H @ mean)
    return float(c - 0.5 * mean @ H @ mean + g @ mean + np.sum(e**2 / (2 * (1 + d)) - 0.5 * np.log1p(d)))


@dataclass
class Joint:
    """x_T ~ N(0, I), x_s = A x_t + b + N(0, C) as one Normal over (x_T, …, x_0), and the reward -1/2 x'Hx + g'x + c, times beta."""

    A: np.ndarray
    b: np.ndarray
    C: np.ndarray
    H: np.ndarray
    g: np.ndarray
    c: float

    @staticmethod
    def of(chain: Any, quadratic: Any) -> Joint:
        """From the numbers of a chain (A, b, C) and of beta·r (P, h, c), whatever classes hold them."""
        A, b, C, H, g = (tensor.numpy() for tensor in (chain.A, chain.b, chain.C, quadratic.P, quadratic.h))
        return Joint(A, b, C, H, g, float(quadratic.c))

    @property
    def steps(self) -> int:
        return len(self.A)

    @property
    def dim(self) -> int:
        return self.b.shape[1]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean ((T+1)·d,) and covariance of the whole trajectory: x = G e + k with e independent noise."""
        T, d = self.steps, self.dim
        G, k = np.zeros((T + 1, d, T + 1, d)), np.zeros((T + 1, d))
        G[0, :, 0] = np.eye(d)
        for i in range(T):
            G[i + 1] = np.einsum("ij,jkl->ikl", self.A[i], G[i])
            values, vectors = np.linalg.eigh(self.C[i])
            G[i + 1, :, i + 1] += vectors * np.sqrt(values.clip(0))
            k[i + 1] = self.A[i] @ k[i] + self.b[i]
        flat = G.reshape((T + 1) * d, (T + 1) * d)
        return k.ravel(), flat @ flat.T

    def end_given(self, i: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of x_0 given x at position i of the trajectory, by conditioning the joint."""
        mean, cov = self.moments()
        d = self.dim
        here, end = slice(i * d, (i + 1) * d), slice(self.steps * d, None)
        gain = cov[end, here] @ np.linalg.inv(cov[here, here])
        return mean[end] + gain @ (x - mean[here]), cov[end, end] - gain @ cov[here, end]

    def log_f(self, i: int, x: np.ndarray) -> float:
        """log E[exp(beta·r(x_0)) | x at position i]."""
        mean, cov = self.end_given(i, x)
        return log_mean_exp_quadratic(mean, cov, self.H, self.g, self.c)

    def log_z(self) -> float:
        mean, cov = self.moments()
        end = slice(self.steps * self.dim, None)
        return log_mean_exp_quadratic(mean[end], cov[end, end], self.H, self.g, self.c)

    def tilted(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the whole trajectory under p(trajectory)·exp(beta·r(x_0)) / Z, x_T included."""
        mean, cov = self.moments()
        end = slice(self.steps * self.dim, None)
        across = cov[:, end]
        inner = np.linalg.inv(np.eye(self.dim) + self.H @ cov[end, end])
        update = across @ inner
        return mean + update @ (self.g - self.H @ mean[end]), cov - update @ self.H @ across.T

    def tilted_transition(self, i: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the posterior's step i from x, by conditioning the tilted joint."""
        mean, cov = self.tilted()
        d = self.dim
        here, then = slice(i * d, (i + 1) * d), slice((i + 1) * d, (i + 2) * d)
        gain = cov[then, here] @ np.linalg.inv(cov[here, here])
        return mean[then] + gain @ (x - mean[here]), cov[then, then] - gain @ cov[here, then]


def spd(seed: int, dim: int, low: float = 0.2) -> np.ndarray:
    """A random symmetric positive definite matrix with eigenvalues from `low` on."""
    root = np.random.default_rng(seed).normal(size=(dim, dim))
    matrix: np.ndarray = root @ root.T / dim + low * np.eye(dim)
    return matrix


def chain_log_z(
    steps: list[tuple[float, float, float]], alpha_bar: list[float], mixture: tuple[Tensor, ...], log_r: Tensor
) -> float:
    """log E[exp(r(x_0))] of the chain of a one-dimensional mixture by quadrature: no samples, no closed form of the chain.

    Args:
        steps: `sampler_formula`.
        alpha_bar: By timestep.
        mixture: means (modes, 1), weights and variance in the chain's units.
        log_r: The reward on `GRID`.
    """
    means, weights, variance = mixture
    f, width = log_r.exp(), float(GRID[1] - GRID[0])
    for t, (by_x, by_noise, std) in zip(range(1, len(alpha_bar)), reversed(steps), strict=True):
        density = noised_mixture(means, weights, float(variance), alpha_bar[t])
        predicted = -math.sqrt(1 - alpha_bar[t]) * score_by_autograd(density, GRID[:, None])[:, 0]
        transition = Normal((by_x * GRID + by_noise * predicted)[:, None], std).log_prob(GRID[None, :]).exp()
        f = width * transition @ f
    return float(torch.log(width * (Normal(0.0, 1.0).log_prob(GRID).exp() * f).sum()))


GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)
"""Spacing 0.005: the trapezoid rule is exact to rounding for Normals of a standard deviation of 0.01 or more."""
