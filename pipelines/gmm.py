r"""A Gaussian mixture as prior, with its exact denoiser; by default the 25 modes of the RTB paper's illustrative example.

The posterior of the reward r = log posterior density - log prior density is the same mixture with other weights: it is known,
and so is log Z = 0. `as_exact` runs the posterior's own exact denoiser through the same chain, which tells the error of finitely
many steps apart from that of learning: in T steps of fixed variance no chain meets the posterior exactly.

The trainable correction is a small network of sines and cosines of x_t and of the prior's E[x_0 | x_t]; see
`pipelines._analytic.mixture_denoiser`.

Example: Venkatraman, Jain, Scimeca, Kim, Sendera et al. 2024, https://arxiv.org/abs/2405.20971, with the component variance of
its code, 0.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from diffusion_rtb.exact import ExactTarget
from diffusion_rtb.interfaces import Reward
from pipelines._analytic.exact import known_posterior, target_of
from pipelines._analytic.mixture import Mixture
from pipelines._analytic.prior import VectorPrior
from pipelines._analytic.schedule import Schedule

__all__ = ["GMM"]

GRID = (-10.0, -5.0, 0.0, 5.0, 10.0)
MEANS: tuple[tuple[float, float], ...] = tuple((x, y) for x in GRID for y in GRID)
"""Of the example's prior; its weights are equal."""

VARIANCE = 0.3

POSTERIOR: Mapping[tuple[float, float], float] = {
    (-10.0, -5.0): 4 / 61,
    (-5.0, -10.0): 10 / 61,
    (-5.0, 0.0): 4 / 61,
    (10.0, -5.0): 5 / 61,
    (0.0, 0.0): 10 / 61,
    (0.0, 5.0): 5 / 61,
    (5.0, -5.0): 4 / 61,
    (5.0, 0.0): 15 / 61,
    (5.0, 10.0): 4 / 61,
}
"""Of the example's posterior: mode -> weight."""

# Found by the ELBO of `as_exact` and the mode weights of the prior's own samples: most steps where modes part. With width 1 the
# truth has ELBO -0.028 in 120 steps and -0.019 in 200, instead of 0; wider ones keep the mode weights of the prior better.
SCHEDULE = Schedule(signal=0.2, noise=0.03, centre=3.0, width=1.5)


class GMM(VectorPrior):
    """sum_k weights_k N(means_k, variance·I) as `diffusion_rtb.interfaces.Prior`.

    Args:
        means: One point per mode; the example's 25 by default.
        weights: One per mode, sum 1; equal by default.
        variance: Of every mode.
        steps: Denoising steps T.
        eta: Noise level of DDIM in [0, 1]; 1 is memoryless, 0 draws no noise.
        scheduler: "DDIMScheduler" or "DDPMScheduler".
        schedule: What differs from the default noise schedule, see `pipelines._analytic.schedule.Schedule`.
        width: Of the hidden layers of the posterior's network.
        layers: Hidden layers of the posterior's network.
        frequencies: Octaves of its features of a vector, from 1/2 radian per standard deviation of the data.
        dtype: "float32" or "float64".
        device: Where to run; the CPU by default.

    Raises:
        ValueError: shapes do not fit, weights are negative or do not sum to 1, or a setting is out of range.
    """

    def __init__(
        self,
        means: list[list[float]] | None = None,
        weights: list[float] | None = None,
        variance: float = VARIANCE,
        *,
        steps: int = 100,
        eta: float = 1.0,
        scheduler: str = "DDIMScheduler",
        schedule: Mapping[str, float] | None = None,
        width: int = 128,
        layers: int = 3,
        frequencies: int = 6,
        dtype: Literal["float32", "float64"] = "float32",
        device: str | None = None,
    ) -> None:
        for name, value in (("width", width), ("layers", layers), ("frequencies", frequencies)):
            if value < 1:
                raise ValueError(f"{name}={value}: the posterior's network needs at least 1.")
        self.mixture = Mixture.of(MEANS if means is None else means, weights, variance)
        density = {
            "means": self.mixture.means.tolist(),
            "weights": self.mixture.weights.tolist(),
            "variance": float(variance),
        }
        self._network = {"width": width, "layers": layers, "frequencies": frequencies}

        def make() -> Any:
            from pipelines._analytic.mixture_denoiser import MixtureDenoiser

            return MixtureDenoiser(**density, steps=steps, **self._network)

        super().__init__(
            "gmm",
            density,
            make,
            schedule=Schedule.of(schedule, SCHEDULE),
            steps=steps,
            eta=eta,
            scheduler=scheduler,
            dtype=dtype,
            device=device,
        )

    def attach(self, *, seed: int = 0) -> None:
        """Add the posterior's network, of the sizes given to the constructor; at the start posterior = prior.

        Args:
            seed: Of the network's hidden layers.

        Raises:
            ValueError: there is a posterior already.
        """
        self._attached(seed, {"kind": "network", **self._network})

    def posterior(
        self, modes: Sequence[Sequence[float]] | None = None, weights: Sequence[float] | None = None
    ) -> Mixture:
        """The prior's modes with the weights of a posterior; the example's by default. It samples exactly, and tells modes apart.

        Args:
            modes: Those that the posterior keeps, each a mean of the prior.
            weights: One for each of them, sum 1; equal by default.

        Raises:
            ValueError: a point is no mode of the prior, or the weights are impossible.
        """
        if modes is None:
            modes, weights = list(POSTERIOR), list(POSTERIOR.values()) if weights is None else weights
        return self.mixture.weighted(modes, weights)

    @contextmanager
    def as_exact(self, posterior: Mixture) -> Iterator[None]:
        """Inside the block the network is the exact denoiser of this posterior: the truth, run through the same chain.

        Raises:
            ValueError: its modes are not the prior's.
        """
        if posterior.means.shape != self.mixture.means.shape or not bool((posterior.means == self.mixture.means).all()):
            raise ValueError("This mixture has other modes than the prior: make it with `posterior(modes, weights)`.")
        with self.pipe.denoiser.weighted(posterior.weights):
            yield

    def exact_target(self, reward: Reward, beta: float) -> ExactTarget:
        """The posterior of a reward log f - log p, f a mixture of this prior's modes and p this prior, for comparisons.

        Raises:
            ValueError: the reward is another, or beta is not 1.
        """
        posterior = known_posterior(self.mixture, reward, beta)
        return target_of(self.mixture, posterior, lambda: self.as_exact(posterior))
