"""A prior whose posterior is known: standard normal 4 x 4 pixels, sampled by the stock `DDIMPipeline`.

Data ~ N(0, I) has the exact noise predictor eps(x_t) = sqrt(1 - ab_t)·x_t, so every transition is linear and a chain of few
steps ends in N(0, v·I) with a v below 1 that `end_variance` computes. With r(x) = c·x and |c| = 1 the posterior is
N(beta·v·c, v·I) and log Z = KL(posterior || prior) = beta²·v/2; its transitions are the prior's, shifted by a constant per step,
which is what the posterior here can learn: it adds a table of one number per step and channel to eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor


class PixelNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """eps(x_t) = sqrt(1 - ab_t)·x_t + shift[t]."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, sample_size: int = 4, in_channels: int = 3, timesteps: int = 1000) -> None:
        super().__init__()
        self.register_buffer("ab", torch.ones(timesteps))
        self.shift = torch.nn.Parameter(torch.zeros(timesteps, 3, 1, 1), requires_grad=False)
        self.on = True

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        eps = (1 - self.ab[timestep]).sqrt() * sample
        return UNet2DOutput(sample=eps + self.shift[timestep] if self.on else eps)


class PixelPrior:
    """`diffusion_rtb.interfaces.Prior` without text, adapters library or autoencoder."""

    def __init__(self, steps: int = 6) -> None:
        # alpha_bar = cos² of equal angles: no step weighs much more than another, so that one learning rate fits all.
        ab = torch.linspace(math.asin(0.1), math.acos(0.01), 1000, dtype=torch.float64).cos().square()
        betas = 1 - ab / torch.cat([torch.ones(1), ab[:-1]])
        scheduler = DDIMScheduler(
            trained_betas=betas.tolist(), clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False
        )
        network = PixelNetwork()
        network.ab.copy_(scheduler.alphas_cumprod)
        self.steps = steps
        self._pipe = DDIMPipeline(network, scheduler)
        self._pipe.scheduler = scheduler
        self._pipe.set_progress_bar_config(disable=True)

    @property
    def pipe(self) -> Any:
        return self._pipe

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dims(self) -> tuple[int, ...]:
        return (3, 4, 4)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"batch_size": len(prompts), "num_inference_steps": self.steps, "eta": 1.0}

    def features(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0.detach()  # no picture: the reward reads the three numbers

    def attach(self) -> None:
        self._pipe.unet.shift.requires_grad_(True)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"shift": self._pipe.unet.shift}

    @contextmanager
    def as_prior(self) -> Iterator[None]:
        self._pipe.unet.on = False
        try:
            yield
        finally:
            self._pipe.unet.on = True

    def fingerprint(self) -> dict[str, Any]:
        return {"family": "pixel", "steps": self.steps}

    def export(self, folder: Path, card: str) -> None:
        (folder / "card.md").write_text(card, encoding="utf-8")


def linear_steps(prior: PixelPrior) -> list[tuple[float, float, float]]:
    """(a, std², k) of x_s = a·x_t + k·shift + std·z, step by step: DDIM at eta 1 (Song et al. 2021) with the exact eps."""
    scheduler = prior.pipe.scheduler
    scheduler.set_timesteps(prior.steps)
    ends = scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist()
    steps = []
    for ab_t, ab_s in zip(ends, [*ends[1:], float(scheduler.alphas_cumprod[0])], strict=True):
        variance = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        direction = math.sqrt(1 - ab_s - variance)
        a = math.sqrt(ab_s * ab_t) + direction * math.sqrt(1 - ab_t)
        steps.append((a, variance, direction - math.sqrt(ab_s * (1 - ab_t) / ab_t)))
    return steps


def end_variance(prior: PixelPrior) -> float:
    """v: the chain starts from N(0, I)."""
    v = 1.0
    for a, variance, _ in linear_steps(prior):
        v = a * a * v + variance
    return v


def set_known_posterior(prior: PixelPrior, beta: float) -> None:
    """The optimal transitions: V(x_s) = g·c·x_s + const with g = beta at x_0, so each mean moves by std²·g·c."""
    g = beta
    steps = linear_steps(prior)
    timesteps = prior.pipe.scheduler.timesteps.tolist()
    with torch.no_grad():
        for t, (a, variance, k) in reversed(list(zip(timesteps, steps, strict=True))):
            prior.pipe.unet.shift[t, 1] = variance * g / 4 / k
            g *= a


def green(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """r(x) = c·x with c = 1/4 in the 16 green entries and 0 elsewhere."""
    return images[:, 1].flatten(1).sum(1) / 4


class Signs:
    """Judge and embedding in one: is the green sum positive? Pictures of one sign point the same way."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return green(images, prompts)

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.flatten(1), dim=1)

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        positive = (green(images, []) > 0).float()
        return torch.stack([1 - positive, positive], dim=1).clamp(1e-6, 1).log()
