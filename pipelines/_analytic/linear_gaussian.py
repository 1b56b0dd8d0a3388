r"""Chains with affine means and Normal noise, and quadratic rewards: the posterior, log Z and V in closed form, float64.

    p:   x_s = A x_t + b + N(0, C)     x_T ~ N(0, I)          beta·r(x_0) = -1/2 x'Px + h'x + c

log F(x_t) = log E_p[exp(beta·r(x_0)) | x_t] is quadratic at every step. With log F(x_s) = -1/2 x'Px + h'x + c, m = A x_t + b
and M = (I + C P)^-1, completing the square gives

    log F(x_t) = -1/2 m'P M m + h'M m + 1/2 h'M C h - 1/2 log det(I + C P) + c,        V(x_t) = log F(x_t) / beta
    p*(x_s | x_t) = Normal( M (m + C h), M C )

the posterior's transition. Its covariance M C is not C: with transitions of fixed covariance C the posterior can be met
exactly only where P = 0, that is, for rewards linear in x, whose posterior moves each mean by C h and nothing else.
Else the best chain q of covariance C, for KL(q || p*) as for KL(p* || q), has the very means of p* (the linear-quadratic
regulator's certainty equivalence), and misses, whatever x is,

    gap = sum over steps of 1/2 [ tr(C P) - log det(I + C P) ]        nats, 0 in the limit of many short steps.

x_T is drawn from N(0, I) by posterior and prior alike, so E[log F(x_T)] - gap is the best ELBO. log Z = log E[F(x_T)] is larger by
what x_T tells about x_0, next to nothing where the chain is memoryless.

KL control: Todorov 2009, https://doi.org/10.1073/pnas.0710743106. Certainty equivalence: Theil 1957,
https://www.econometricsociety.org/publications/econometrica/1957/04/01/note-certainty-equivalence-dynamic-planning
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["AffineChain", "Quadratic", "Tilt", "kl"]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f(x) = -1/2 x'Px + h'x + c."""

    P: Float[Tensor, "dim dim"]
    """Symmetric."""
    h: Float[Tensor, " dim"]
    c: Float[Tensor, ""]

    def __call__(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """f of each row."""
        return -0.5 * ((x @ self.P) * x).sum(1) + x @ self.h + self.c

    def after(self, A: Float[Tensor, "dim dim"], b: Float[Tensor, " dim"]) -> Quadratic:
        """x -> f(A x + b)."""
        return Quadratic(_symmetric(A.T @ self.P @ A), A.T @ (self.h - self.P @ b), self(b[None])[0])

    def __mul__(self, factor: float) -> Quadratic:
        return Quadratic(factor * self.P, factor * self.h, factor * self.c)

    def expectation(self, mean: Float[Tensor, " dim"], cov: Float[Tensor, "dim dim"]) -> Float[Tensor, ""]:
        """E f(x), x ~ N(mean, cov)."""
        return self(mean[None])[0] - 0.5 * (self.P * cov).sum()

    def smoothed(self, C: Float[Tensor, "dim dim"]) -> Quadratic:
        """m -> log E exp f(m + N(0, C)).

        Raises:
            ValueError: the expectation is infinite.
        """
        M = torch.linalg.inv(self.widened(C))
        P = _symmetric(self.P @ M)
        c = self.c - 0.5 * torch.logdet(self.widened(C)) + 0.5 * self.h @ M @ C @ self.h
        return Quadratic(P, M.T @ self.h, c)

    def tilted(
        self, mean: Float[Tensor, " dim"], C: Float[Tensor, "dim dim"]
    ) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"], Float[Tensor, ""]]:
        """Mean and covariance of N(x; mean, C)·exp(f(x)) / Z, and log Z."""
        M = torch.linalg.inv(self.widened(C))
        return M @ (mean + C @ self.h), _symmetric(M @ C), self.smoothed(C)(mean[None])[0]

    def widened(self, C: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
        """I + C P, whose determinant is positive as long as expectations of exp f are finite."""
        root = _root(C)
        eye = torch.eye(len(self.h), dtype=C.dtype)
        smallest = float(torch.linalg.eigvalsh(eye + root.T @ self.P @ root)[0])
        if smallest <= 0:
            raise ValueError(
                f"E[exp(beta·r)] is infinite: 1 + variance·precision is {smallest:.3g} in some direction. A reward that grows "
                "quadratically must grow slower than the prior's density falls: lower beta, or make `precision` positive."
            )
        return eye + C @ self.P


@dataclass(frozen=True, eq=False)
class AffineChain:
    """x_T ~ N(0, I), x_s = A_i x_t + b_i + N(0, C_i) for steps i = 0 (from x_T) to T - 1 (to x_0).

    A step with C_i = 0 is a deterministic map: it has no density, and p and q must have the same.
    """

    A: Float[Tensor, "steps dim dim"]
    b: Float[Tensor, "steps dim"]
    C: Float[Tensor, "steps dim dim"]

    @property
    def steps(self) -> int:
        return len(self.A)

    @property
    def dim(self) -> int:
        return self.b.shape[1]

    @property
    def stochastic(self) -> Int[Tensor, " dense"]:
        """Indices of the steps with a density."""
        return (self.C != 0).any(2).any(1).nonzero().flatten()

    @cached_property
    def marginals(self) -> tuple[Float[Tensor, "steps_and_one dim"], Float[Tensor, "steps_and_one dim dim"]]:
        """Means and covariances of x_T, …, x_0."""
        mean, cov = torch.zeros_like(self.b[0]), torch.eye(self.dim, dtype=self.b.dtype)
        means, covs = [mean], [cov]
        for A, b, C in zip(self.A, self.b, self.C, strict=True):
            mean, cov = A @ mean + b, _symmetric(A @ cov @ A.T + C)
            means.append(mean)
            covs.append(cov)
        return torch.stack(means), torch.stack(covs)

    def means(self, x: Float[Tensor, "batch steps_and_one dim"]) -> Float[Tensor, "batch steps dim"]:
        """Mean of each transition of these trajectories."""
        return torch.einsum("sij,bsj->bsi", self.A, x[:, :-1]) + self.b

    def log_prob(self, x: Float[Tensor, "batch steps_and_one dim"]) -> Float[Tensor, "batch steps"]:
        """log-density of each transition, 0 where there is none; nats."""
        i = self.stochastic
        normal = torch.distributions.MultivariateNormal(self.means(x)[:, i], self.C[i])
        return torch.zeros_like(x[:, 1:, 0]).index_copy(1, i, normal.log_prob(x[:, 1:][:, i]))

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count steps_and_one dim"]:
        """Trajectories."""
        noise = torch.randn(self.steps + 1, count, self.dim, dtype=self.b.dtype, generator=generator)
        x = [noise[0]]
        for A, b, C, z in zip(self.A, self.b, self.C, noise[1:], strict=True):
            x.append(x[-1] @ A.T + b + z @ _root(C).T)
        return torch.stack(x, dim=1)


def kl(q: AffineChain, p: AffineChain) -> Float[Tensor, " steps"]:
    """E_q[log q(x_s | x_t) - log p(x_s | x_t)] of each step; nats. Their sum is KL(q || p), as both start from N(0, I)."""
    means, covs = (m[:-1] for m in q.marginals)
    slope, offset = q.A - p.A, q.b - p.b
    apart = torch.einsum("sij,sj->si", slope, means) + offset
    second_moment = slope @ covs @ slope.mT + apart[:, :, None] * apart[:, None, :]
    i = p.stochastic
    volume = torch.logdet(p.C[i]) - torch.logdet(q.C[i])
    quadratic = (torch.linalg.inv(p.C[i]) * (q.C + second_moment)[i]).sum((1, 2))
    return torch.zeros(q.steps, dtype=volume.dtype).index_put((i,), 0.5 * (quadratic - q.dim + volume))


@dataclass(frozen=True, eq=False)
class Tilt:
    """The posterior p(x)·exp(beta·r(x)) / Z of a chain p and a quadratic reward."""

    p: AffineChain
    beta_r: Quadratic
    """beta·r in the chain's units; nats."""

    @cached_property
    def log_f(self) -> Sequence[Quadratic]:
        """log F of every state, x_T first; the last is beta·r itself. V = log F / beta."""
        found = [self.beta_r]
        for A, b, C in zip(self.p.A.flip(0), self.p.b.flip(0), self.p.C.flip(0), strict=True):
            found.append(found[-1].smoothed(C).after(A, b))
        return found[::-1]

    @cached_property
    def posterior(self) -> AffineChain:
        """p*, with covariances of its own; it starts from N(0, I) as p does."""
        rows = []
        for A, b, C, f in zip(self.p.A, self.p.b, self.p.C, self.log_f[1:], strict=True):
            M = torch.linalg.inv(f.widened(C))
            rows.append((M @ A, M @ (b + C @ f.h), _symmetric(M @ C)))
        A, b, C = (torch.stack(part) for part in zip(*rows, strict=True))
        return AffineChain(A, b, C)

    @property
    def best(self) -> AffineChain:
        """The best chain with the covariances of p: the means of the posterior. Equal to it for a linear reward."""
        return AffineChain(self.posterior.A, self.posterior.b, self.p.C)

    @property
    def gap(self) -> Float[Tensor, " steps"]:
        """KL(best || posterior) of each step, the same for every x_t; nats."""
        pairs = list(zip(self.p.C, self.log_f[1:], strict=True))
        return torch.stack([0.5 * ((C * f.P).sum() - torch.logdet(f.widened(C))) for C, f in pairs])

    @property
    def log_z(self) -> float:
        """log E_p[exp(beta·r(x_0))]; nats."""
        zero = torch.zeros_like(self.beta_r.h)
        return float(self.log_f[0].smoothed(torch.eye(len(zero), dtype=zero.dtype))(zero[None])[0])

    @property
    def mean_log_f(self) -> float:
        """E[log F(x_T)], the ELBO of the posterior's transitions from an x_T ~ N(0, I); nats."""
        zero = torch.zeros_like(self.beta_r.h)
        return float(self.log_f[0].expectation(zero, torch.eye(len(zero), dtype=zero.dtype)))

    def elbo(self, q: AffineChain) -> float:
        """E_q[beta·r(x_0)] - KL(q || p) <= mean_log_f <= log_z; nats."""
        means, covs = q.marginals
        return float(self.beta_r.expectation(means[-1], covs[-1]) - kl(q, self.p).sum())

    @property
    def best_elbo(self) -> float:
        """That of `best`; no chain with the covariances of p has a higher one."""
        return self.mean_log_f - float(self.gap.sum())

    @property
    def end(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        """Mean and covariance of p(x_0)·exp(beta·r(x_0)) / Z, p(x_0) what the chain ends in."""
        means, covs = self.p.marginals
        mean, cov, _ = self.beta_r.tilted(means[-1], covs[-1])
        return mean, cov


def _root(C: Tensor) -> Tensor:
    """L with L L' = C; a step without noise has none."""
    return torch.linalg.cholesky(C) if bool(C.any()) else C


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
