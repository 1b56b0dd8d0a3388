"""The noise predictor of a Gaussian mixture, in closed form, with a small network as correction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from pipelines._analytic.pipeline import VectorDenoiser

__all__ = ["FourierNetwork", "MixtureDenoiser"]

TIME = 16
"""Length of the embedding of t."""


DRAWN = 64
"""States per mode by which `MixtureDenoiser.reach` is measured."""


class FourierNetwork(nn.Module):
    """u(x_t, t): layers of sines and cosines of x_t and of the prior's E[x_0 | x_t], each scaled and shifted by t; 0 at the start.

    E[x_0 | x_t] is what the prior has to offer, as the prediction of any network would be: between two modes it lies on the line
    that joins them, and what the posterior has to change is a smoother function of it than of x_t.

    All rows of a call share one timestep, so whatever depends on t alone is computed for one row.

    Args:
        dim: Numbers in x_t.
        steps: T.
        width: Of the hidden layers.
        layers: Hidden layers.
        frequencies: Octaves from 1/2 radian per unit of x_t, whose standard deviation is 1.
    """

    octaves: Tensor

    def __init__(self, dim: int, steps: int, width: int, layers: int, frequencies: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("octaves", 2.0 ** torch.arange(-1, frequencies - 1), persistent=False)
        sizes = [2 * dim * (1 + 2 * frequencies)] + [width] * layers
        self.time = nn.Sequential(nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, 2 * width * layers))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, x_t: Float[Tensor, "batch dim"], clean: Float[Tensor, "batch dim"], timestep: Any
    ) -> Float[Tensor, "batch dim"]:
        """u, in standard deviations of the step; `clean` is the prior's E[x_0 | x_t], `timestep` one number from 1 to T."""
        films = self.time(self._embedded(x_t, timestep)).unflatten(0, (len(self.layers), 2, -1))
        seen = torch.cat([x_t, clean], dim=1)
        angle = (seen[:, :, None] * self.octaves).flatten(1)
        h = torch.cat([seen, angle.sin(), angle.cos()], dim=1)
        for layer, (scale, shift) in zip(self.layers, films, strict=True):
            h = silu(torch.addcmul(shift, layer(h), 1 + scale))
        u: Tensor = self.output(h)
        return u

    def _embedded(self, x_t: Tensor, timestep: Any) -> Float[Tensor, " time"]:
        angle = (math.pi * float(timestep) / self.steps) * 2.0 ** torch.arange(TIME // 2).to(x_t) / 2
        return torch.cat([angle.sin(), angle.cos()])


class MixtureDenoiser(VectorDenoiser):
    r"""E[noise | x_t] = sqrt(1 - alpha_bar) / v · (x_t - sqrt(alpha_bar)·sum_k w_k(x_t) m_k) for standardised data.

    v = alpha_bar·variance + 1 - alpha_bar is the variance of a mode at that step, and w_k(x_t), the probability that x_t came
    from mode k, is proportional to weight_k·N(x_t; sqrt(alpha_bar)·m_k, v·I).

    Args:
        means: One point per mode.
        weights: One per mode.
        variance: Of every mode.
        steps: T.
        width: Of the correction's layers.
        layers: Of the correction.
        frequencies: Of the correction's features.
        corrected: With the correction.
    """

    centres: Tensor
    spread: Tensor
    log_weights: Tensor
    reach: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        means: Sequence[Sequence[float]],
        weights: Sequence[float],
        variance: float,
        steps: int,
        width: int = 128,
        layers: int = 3,
        frequencies: int = 6,
        corrected: bool = False,
    ) -> None:
        super().__init__()
        m, w = torch.tensor(means, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
        shift = w @ m
        scale = ((w @ (m - shift).square()).mean() + variance).sqrt()
        own = {"centres": (m - shift) / scale, "spread": variance / scale**2, "log_weights": w.log()}
        self.prepare(steps, shift=shift, scale=scale, **own)
        self.register_buffer("reach", torch.zeros(steps + 1))
        if corrected:
            self.add_correction()

    @torch.no_grad()
    def follow(self, alpha_bar: Float[Tensor, " steps_and_one"], gain: Float[Tensor, " steps_and_one"]) -> None:
        r"""Set the schedule's tables, and `reach`: by how many standard deviations of its step a posterior may move a mean.

        reach_t = sqrt(mean variance of m_k under w_k(x_t)) · |d mean / d E[x_0 | x_t]| / std

        Where the prior is still undecided between modes this is of the order of 1/sqrt(steps); at the noisy end, and once the mode
        is settled, it is nearly 0, and so is whatever the network says there.
        """
        super().follow(alpha_bar, gain)
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(DRAWN, *self.centres.shape, generator=draw, dtype=self.centres.dtype)
        weights = self.log_weights.exp()
        for t in gain.nonzero().flatten().tolist():
            a = alpha_bar[t].to(noise)
            x_t = a.sqrt() * self.centres + (a * self.spread + 1 - a).sqrt() * noise
            share = self.shares(x_t.flatten(0, 1), a)
            variance = share @ self.centres.square() - (share @ self.centres).square()
            mean = weights @ variance.mean(1).unflatten(0, (DRAWN, -1)).mean(0)
            self.reach[t] = (mean.clamp(min=0) * a / (1 - a)).sqrt() / gain[t].abs()

    def add_correction(self) -> None:
        """Attach the trainable part, drawn from the global generator; the denoiser predicts the same as before."""
        config: Any = self.config
        self.correction = FourierNetwork(self.dim, config.steps, config.width, config.layers, config.frequencies)
        self.register_to_config(corrected=True)

    def corrected(
        self, x_t: Float[Tensor, "batch dim"], timestep: Any, predicted: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch dim"]:
        """u of this state, for which the network also sees where the prior thinks it comes from."""
        alpha_bar = self.alpha_bar[timestep]
        clean = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        assert self.correction is not None
        u: Tensor = self.reach[timestep] * self.correction(x_t, clean, timestep)
        return u

    @contextmanager
    def weighted(self, weights: Float[Tensor, " modes"]) -> Iterator[None]:
        """Inside the block the prior has these weights, and no correction."""
        before, on = self.log_weights, self.posterior_on
        self.log_weights, self.posterior_on = weights.log().to(before), False
        try:
            yield
        finally:
            self.log_weights, self.posterior_on = before, on

    def noise(self, x_t: Float[Tensor, "batch dim"], alpha_bar: Float[Tensor, ""]) -> Float[Tensor, "batch dim"]:
        """From x_t to where its modes are."""
        v = alpha_bar * self.spread + (1 - alpha_bar)
        nearest = self.shares(x_t, alpha_bar) @ (alpha_bar.sqrt() * self.centres)
        return ((1 - alpha_bar).sqrt() / v) * (x_t - nearest)

    def shares(self, x_t: Float[Tensor, "batch dim"], alpha_bar: Float[Tensor, ""]) -> Float[Tensor, "batch modes"]:
        """w_k(x_t); the squared distances of x_t to the modes share |x_t|², which cancels among them."""
        v = alpha_bar * self.spread + (1 - alpha_bar)
        centres = alpha_bar.sqrt() * self.centres
        logits = torch.addmm(self.log_weights - centres.square().sum(1) / (2 * v), x_t, (centres / v).T)
        return logits.softmax(1)
