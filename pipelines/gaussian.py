r"""A Gaussian prior with its exact denoiser, for which posterior, log Z and value function are known at every step.

Data x ~ N(mean, C) in any dimension, a stock DDIM or DDPM chain, and the reward

    r(x) = constant + linear·x - 1/2 (x - mean)' precision (x - mean)

(`rewards.density` takes the same words). Every transition is affine with Normal noise, so `solve` gives the posterior of
the *discrete* chain, not of its limit: log F and V at every state, the posterior's transitions, log Z, KL. With a linear reward
the trainable correction can become the posterior itself, residual 0 on every trajectory; with a quadratic one it can become
the best chain of fixed variances, whose gap to log Z is known. See `pipelines._analytic.linear_gaussian` for the equations.

It is the first example, the oracle of the objectives' tests, and, in many dimensions, a problem whose difficulty is one's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.densities import matrix, point
from diffusion_rtb.exact import ExactTarget, HasLogRatio, LogRatio
from diffusion_rtb.interfaces import Reward
from pipelines._analytic.linear_gaussian import AffineChain, Quadratic, Tilt
from pipelines._analytic.prior import VectorPrior
from pipelines._analytic.schedule import Schedule

__all__ = ["Gaussian"]

SCHEDULE = Schedule(signal=0.03, noise=0.03, centre=0.0, width=2.0)

Matrix = float | list[float] | list[list[float]]
"""A symmetric matrix, its diagonal, or one number for every direction."""


class Gaussian(VectorPrior):
    """N(mean, covariance) as `diffusion_rtb.interfaces.Prior`.

    Args:
        mean: A point.
        covariance: A symmetric positive definite matrix, its diagonal, or one variance for every direction.
        steps: Denoising steps T.
        eta: Noise level of DDIM in [0, 1]; 1 is memoryless, 0 draws no noise.
        scheduler: "DDIMScheduler" or "DDPMScheduler".
        schedule: What differs from the default noise schedule, see `pipelines._analytic.schedule.Schedule`.
        dtype: "float32" or "float64".
        device: Where to run; the CPU by default.

    Raises:
        ValueError: the covariance is not positive definite, shapes do not fit, or a setting is out of range.
    """

    def __init__(
        self,
        mean: list[float],
        covariance: Matrix = 1.0,
        *,
        steps: int = 20,
        eta: float = 1.0,
        scheduler: str = "DDIMScheduler",
        schedule: Mapping[str, float] | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        device: str | None = None,
    ) -> None:
        m, C = point("mean", mean).tolist(), matrix("covariance", covariance, len(mean))
        smallest = float(torch.linalg.eigvalsh(C)[0])
        if smallest <= 1e-12 * float(C.abs().max()):
            raise ValueError(f"covariance has the eigenvalue {smallest:.4g}: it must be positive definite.")

        def make() -> Any:
            from pipelines._analytic.gaussian_denoiser import GaussianDenoiser

            return GaussianDenoiser(m, C.tolist(), steps)

        super().__init__(
            "gaussian",
            {"mean": m, "covariance": C.tolist()},
            make,
            schedule=Schedule.of(schedule, SCHEDULE),
            steps=steps,
            eta=eta,
            scheduler=scheduler,
            dtype=dtype,
            device=device,
        )

    def attach(self) -> None:
        """Add the posterior's correction, affine in x_t with its own numbers at each step; at the start posterior = prior.

        Raises:
            ValueError: there is a posterior already.
        """
        self._attached(0, {"kind": "affine", "steps": self.steps})

    @torch.no_grad()
    def chain(self) -> AffineChain:
        """The transitions of the network as it is now, in the chain's units: the posterior's, or the prior's inside `as_prior`."""
        denoiser, device = self.pipe.denoiser, self.device
        zero_and_axes = torch.cat([torch.zeros(1, *self.dims), torch.eye(*self.dims)]).to(device, denoiser.dtype)
        eye, steps = torch.eye(*self.dims, dtype=torch.float64), self.coefficients
        A, b = [], []
        for t, by_x, by_noise in zip(steps.timesteps, steps.by_x, steps.by_noise, strict=True):
            predicted = denoiser(zero_and_axes, torch.tensor(t, device=device)).double().cpu()
            A.append(by_x * eye + by_noise * (predicted[1:] - predicted[0]).T)
            b.append(by_noise * predicted[0])
        return AffineChain(torch.stack(A), torch.stack(b), steps.std.square()[:, None, None] * eye)

    def reward(
        self,
        mean: Sequence[float] | None = None,
        precision: Matrix | None = None,
        linear: Sequence[float] | None = None,
        constant: float = 0.0,
    ) -> Quadratic:
        """r(x) as a function of the chain's x_0, in reward units; the arguments are those of `rewards.density`.

        Args:
            mean: Where the quadratic part is highest; the origin by default.
            precision: A symmetric matrix, its diagonal, or one number; None for no quadratic part.
            linear: Slope; None for none.
            constant: In reward units.

        Raises:
            ValueError: shapes do not fit the prior, or neither part is given.
        """
        if precision is None and linear is None:
            raise ValueError("The reward needs `precision`, `linear` or both: without them it is the same everywhere.")
        dim = self.dims[0]
        m, a = (point(name, given or [0.0] * dim, dim) for name, given in (("mean", mean), ("linear", linear)))
        P = matrix("precision", precision or 0.0, dim)
        r = Quadratic(P, P @ m + a, constant - 0.5 * m @ P @ m)
        denoiser = self.pipe.denoiser
        return r.after(
            denoiser.scale.double().cpu() * torch.eye(dim, dtype=torch.float64), denoiser.shift.double().cpu()
        )

    def solve(self, beta: float, **reward: Any) -> Tilt:
        """Everything about p(x)·exp(beta·r(x)) / Z for the arguments of `reward`: log F, transitions, log Z, ELBO, gap.

        Raises:
            ValueError: see `reward`; or E[exp(beta·r)] is infinite.
        """
        with self.as_prior():
            return Tilt(self.chain(), self.reward(**reward) * beta)

    @torch.no_grad()
    def set_posterior(self, q: AffineChain) -> None:
        """Make the posterior this chain, whose variances must be the prior's: `solve(...).best`.

        Raises:
            ValueError: there is no posterior to set, or the chain has other variances.
        """
        if not self.parameters():
            raise ValueError("There is no posterior to set: call attach() first.")
        if not bool((self.coefficients.std > 0).any()):
            raise ValueError("A chain without noise, eta=0, has no transitions to set: give the prior another eta.")
        with self.as_prior():
            p = self.chain()
        if q.C.shape != p.C.shape or not torch.allclose(q.C, p.C, rtol=1e-6, atol=0):
            raise ValueError(
                "The posterior's transitions have the prior's variances; take `best` instead of `posterior`."
            )
        own, std = self.parameters(), self.coefficients.std
        per_std = torch.where(std > 0, 1 / std, 0)
        own["slope"].copy_((per_std[:, None, None] * (q.A - p.A)).flip(0))  # by timestep: the step to x_0 comes first
        own["offset"].copy_((per_std[:, None] * (q.b - p.b)).flip(0))

    def exact_target(self, reward: Reward, beta: float) -> ExactTarget:
        """The posterior of the chain for a quadratic or linear `density`, for comparisons; it has no separate modes.

        Its denoiser is that of `solve(...).best`, the best chain of the prior's variances; of a chain without noise, eta 0, what
        it draws is known and no denoiser is, as none makes that map end in the posterior exactly.

        Raises:
            ValueError: the reward is another.
        """
        ratio = reward.log_ratio() if isinstance(reward, HasLogRatio) else None
        if ratio is None or ratio != LogRatio(ratio.density) or "means" in ratio.density:
            raise ValueError(
                f"The posterior of this prior is not known in closed form for the reward {type(reward).__name__} ({ratio}). "
                "It is for {component: density, density: {mean, precision, linear, constant}} or {mean, covariance}, without "
                "`minus` and bounds."
            )
        tilt = self.solve(beta, **quadratic(ratio.density))
        mean, cov = self.in_data_units(*tilt.end)
        root = torch.linalg.cholesky(cov)

        def sample(count: int, generator: torch.Generator) -> Tensor:
            return mean + torch.randn(count, len(mean), dtype=torch.float64, generator=generator) @ root.T

        normal = torch.distributions.MultivariateNormal(mean, scale_tril=root)
        as_exact = partial(self._as_chain, tilt.best) if self.eta else None
        return ExactTarget(tilt.log_z, sample, as_exact, log_density=lambda x: normal.log_prob(x.double()))

    @contextmanager
    def _as_chain(self, q: AffineChain) -> Iterator[None]:
        """Inside the block the posterior is this chain; see `set_posterior`."""
        held = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        self.set_posterior(q)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters().items():
                    parameter.copy_(held[name])

    def in_data_units(
        self, mean: Float[Tensor, " dim"], cov: Float[Tensor, "dim dim"]
    ) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        """Mean and covariance of decoded vectors from those of x_0."""
        scale, shift = (value.double().cpu() for value in (self.pipe.denoiser.scale, self.pipe.denoiser.shift))
        return shift + scale * mean, scale**2 * cov


def quadratic(density: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Gaussian.reward` for a density written as those, or as a Gaussian {mean, covariance}."""
    if "covariance" not in density:
        return dict(density)
    mean = density["mean"]
    C = matrix("covariance", density["covariance"], len(mean))
    constant = -0.5 * float(torch.logdet(2 * torch.pi * C))
    return {"mean": mean, "precision": torch.linalg.inv(C).tolist(), "constant": constant}
