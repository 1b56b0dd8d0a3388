"""A chain in one dimension with affine means, every gradient of interest known: the oracle of the policy gradients' tests.

    q:   x_T ~ N(0, 1),   x_s = a_t x_t + b_t + std_t z        theta = (a_t, b_t) of every step; p is the same with other numbers
    r(x_0) = -1/2 curve·x_0² + slope·x_0

States are Normal, so E_q[r], KL(q || p), its local part and KL(p || q) are polynomials of theta, differentiated by autograd;
nothing of the package is used for them. Per-trajectory gradients of an objective come from its cotangents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from diffusion_rtb.interfaces import Loss, Terms

Answer = Callable[[Terms, float], Loss]


@dataclass
class AffinePolicy:
    """q and p as tables of (a, b), (steps, 2), with common deviations (steps,); float64."""

    theta: Tensor
    prior: Tensor
    std: Tensor
    curve: float = 0.0
    slope: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.std)

    # Trajectories and densities

    def sample(self, count: int, generator: torch.Generator, theta: Tensor | None = None, widen: float = 1.0) -> Tensor:
        """Trajectories (count, steps + 1) of theta, q's by default, with deviations widened by a factor."""
        z = torch.randn(self.steps + 1, count, generator=generator, dtype=torch.float64)
        x = [z[0]]
        for (a, b), std, noise in zip(self.theta if theta is None else theta, self.std, z[1:], strict=True):
            x.append(a * x[-1] + b + widen * std * noise)
        return torch.stack(x, dim=1)

    def log_density(self, x: Tensor, theta: Tensor, widen: float = 1.0) -> Tensor:
        return Normal(theta[:, 0] * x[:, :-1] + theta[:, 1], widen * self.std).log_prob(x[:, 1:])

    def reward(self, x: Tensor) -> Tensor:
        return -0.5 * self.curve * x[:, -1] ** 2 + self.slope * x[:, -1]

    def terms(self, x: Tensor, prompt: Tensor | None = None, log_behaviour: Tensor | None = None) -> Terms:
        """What the trainer would make of these trajectories."""
        gap = (self.theta - self.prior) @ torch.stack(
            [x[:, :-1], torch.ones_like(x[:, :-1])], dim=1
        )  # (batch, steps, steps)
        kl = 0.5 * (torch.diagonal(gap, dim1=1, dim2=2) / self.std) ** 2
        log_q = self.log_density(x, self.theta)
        return Terms(
            log_q=log_q.requires_grad_(),
            log_p=self.log_density(x, self.prior),
            reward=self.reward(x),
            prompt=torch.zeros(len(x), dtype=torch.long) if prompt is None else prompt,
            x=x[:, :, None],
            timesteps=torch.arange(self.steps, 0, -1, dtype=torch.float64),
            features=torch.ones(len(x), 1, dtype=torch.float64),
            log_behaviour=log_q.detach() if log_behaviour is None else log_behaviour,
            kl=kl.requires_grad_(),
        )

    # Gradients with respect to theta, (batch, steps, 2)

    def gradients(self, objective: Answer, terms: Terms, beta: float) -> Tensor:
        """What each trajectory adds to the gradient of the loss, times their number: their mean is the gradient."""
        assert terms.kl is not None
        leaves = [terms.log_q, terms.kl]
        loss = objective(terms, beta).loss
        by_q, by_kl = torch.autograd.grad(loss, leaves, allow_unused=True)
        x = terms.x[:, :, 0]
        inputs = torch.stack([x[:, :-1], torch.ones_like(x[:, :-1])], dim=2)
        score = (x[:, 1:] - (self.theta * inputs).sum(2)) / self.std**2
        total = torch.zeros_like(inputs)
        if by_q is not None:
            total = total + (by_q * score)[:, :, None] * inputs
        if by_kl is not None:
            apart = ((self.theta - self.prior) * inputs).sum(2) / self.std**2
            total = total + (by_kl * apart)[:, :, None] * inputs
        return len(x) * total

    # The truth

    def moments(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of x_T, …, x_0."""
        mean, variance = [torch.zeros((), dtype=torch.float64)], [torch.ones((), dtype=torch.float64)]
        for (a, b), std in zip(theta, self.std, strict=True):
            mean.append(a * mean[-1] + b)
            variance.append(a**2 * variance[-1] + std**2)
        return torch.stack(mean), torch.stack(variance)

    def _divergence(self, theta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """sum_t E |mean_theta(x_t) - mean_p(x_t)|² / (2 std²) for states of these moments."""
        da, db = (theta - self.prior).unbind(1)
        return ((da**2 * (variance + mean**2) + 2 * da * db * mean + db**2)[: self.steps] / (2 * self.std**2)).sum()

    def kl(self, theta: Tensor) -> Tensor:
        """KL(q || p) of trajectories."""
        mean, variance = self.moments(theta)
        return self._divergence(theta, mean[:-1], variance[:-1])

    def local_kl(self, theta: Tensor) -> Tensor:
        """The same with the states held where they are: its gradient is the local part."""
        mean, variance = self.moments(theta.detach())
        return self._divergence(theta, mean[:-1], variance[:-1])

    def forward_kl(self, theta: Tensor) -> Tensor:
        """KL(p || q): equal deviations make the divergence of a step symmetric, the states are the prior's."""
        mean, variance = self.moments(self.prior)
        return self._divergence(theta, mean[:-1], variance[:-1])

    def posterior(self, beta: float) -> MultivariateNormal:
        """p·exp(beta·r) / Z of whole trajectories (x_T, …, x_0), whose start is tilted too."""
        means, _ = self.moments(self.prior)
        step = torch.eye(self.steps + 1, dtype=torch.float64)
        step[1:, :-1] -= torch.diag(self.prior[:, 0])  # (x - means) @ step.T are the noises of the steps
        precision = step.T @ torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), self.std**-2])) @ step
        pull = precision @ means
        precision[-1, -1] += beta * self.curve
        pull[-1] += beta * self.slope
        return MultivariateNormal(torch.linalg.solve(precision, pull), precision_matrix=precision)

    def log_z(self, beta: float) -> float:
        """log E_p[exp(beta·r)], by Bayes at a trajectory of zeros: log p + beta·r - log p*."""
        x = torch.zeros(1, self.steps + 1, dtype=torch.float64)
        start = Normal(x.new_zeros(()), x.new_ones(())).log_prob(x[:, 0])
        log_p = start + self.log_density(x, self.prior).sum(1)
        return float(log_p + beta * self.reward(x) - self.posterior(beta).log_prob(x))

    def cross_entropy(self, theta: Tensor, beta: float) -> Tensor:
        """-E_p*[log q] of trajectories: KL(p* || q) up to what does not depend on theta."""
        truth = self.posterior(beta)
        mean, cov = truth.mean, truth.covariance_matrix
        a, b = theta.unbind(1)
        variance = cov.diagonal()
        spread = variance[1:] - 2 * a * cov.diagonal(1) + a**2 * variance[:-1]
        return ((spread + (mean[1:] - a * mean[:-1] - b) ** 2) / (2 * self.std**2)).sum()

    def expected_reward(self, theta: Tensor) -> Tensor:
        mean, variance = self.moments(theta)
        return -0.5 * self.curve * (variance[-1] + mean[-1] ** 2) + self.slope * mean[-1]

    def gradient(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient at q of a function of theta."""
        theta = self.theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(theta), theta)
        return found


def example(curve: float = 0.5, slope: float = 0.8) -> AffinePolicy:
    """Three steps, q a little away from p: every trajectory's weight has a variance, and k3 of a whole trajectory too."""
    prior = torch.tensor([[0.6, 0.0], [0.7, 0.1], [0.8, -0.1]], dtype=torch.float64)
    away = torch.tensor([[0.05, 0.25], [-0.1, 0.2], [0.12, 0.3]], dtype=torch.float64)
    return AffinePolicy(prior + away, prior, torch.tensor([0.8, 0.7, 0.6], dtype=torch.float64), curve, slope)


@dataclass
class Estimate:
    """Mean of independent draws of a gradient, with its standard error; (steps, 2)."""

    mean: Tensor
    error: Tensor
    count: int

    @staticmethod
    def of(draws: Tensor) -> Estimate:
        """From (draws, steps, 2)."""
        return Estimate(draws.mean(0), draws.std(0) / len(draws) ** 0.5, len(draws))

    def distance(self, truth: Tensor) -> float:
        """Largest deviation of an entry from the truth, in standard errors."""
        return float(((self.mean - truth) / self.error).abs().max())


def expected_gradient(
    policy: AffinePolicy,
    objective: Answer,
    *,
    beta: float = 1.0,
    group: int = 8,
    groups: int = 200,
    batches: int = 25,
    seed: int = 0,
    behaviour: tuple[Tensor, float] | None = None,
) -> Estimate:
    """Expected gradient of an objective that compares the trajectories of a group; groups are independent draws.

    Args:
        policy: q, p and r.
        objective: A loss on terms.
        beta: nats per unit of reward.
        group: Trajectories of one prompt.
        groups: Prompts in one call of the objective.
        batches: Calls.
        seed: Of the draws.
        behaviour: theta and widening of the chain that draws; q itself by default.
    """
    generator = torch.Generator().manual_seed(seed)
    theta, widen = behaviour or (policy.theta, 1.0)
    prompt = torch.arange(groups).repeat_interleave(group)
    draws = []
    for _ in range(batches):
        x = policy.sample(groups * group, generator, theta, widen)
        terms = policy.terms(x, prompt, policy.log_density(x, theta, widen))
        each = policy.gradients(objective, terms, beta)
        draws.append(each.unflatten(0, (groups, group)).mean(1))
    return Estimate.of(torch.cat(draws))
