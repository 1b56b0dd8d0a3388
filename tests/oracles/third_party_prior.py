"""A prior of somebody else's in one file: own scheduler, own loop, own network; no diffusers class, no LoRA, no snippet.

The chain is x_T = z_T and x_s = a·x_t + b·z + c·u(t), Gaussian throughout, so that the posterior of a linear reward is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_rtb import trajectory_noise
from diffusion_rtb.exact import ExactTarget
from diffusion_rtb.interfaces import Reward

A, B = 0.8, 0.6  # a² + b² = 1: every state is standard normal


class WalkScheduler:
    """x_s = model_output + b·noise."""

    def __init__(self) -> None:
        self.timesteps = torch.arange(0)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps - 1, -1, -1)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, variance_noise: Tensor | None = None
    ) -> tuple[Tensor]:
        noise = torch.randn(sample.shape, dtype=sample.dtype) if variance_noise is None else variance_noise
        return (model_output + B * noise,)


class WalkPipeline:
    """The loop."""

    def __init__(self, dim: int, steps: int) -> None:
        self.scheduler, self.dim, self.steps = WalkScheduler(), dim, steps
        self.shifts: nn.Parameter | None = None
        self.posterior_on = True

    def __call__(
        self,
        batch: int,
        generator: list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
    ) -> Tensor:
        generators = generator or [torch.Generator().manual_seed(k) for k in range(batch)]
        noise = trajectory_noise(generators, self.steps, (self.dim,))
        x = noise[0] if latents is None else latents
        self.scheduler.set_timesteps(self.steps)
        for i, t in enumerate(self.scheduler.timesteps):
            mean = A * x
            if self.shifts is not None and self.posterior_on:
                mean = mean + self.shifts[t]
            x = self.scheduler.step(mean, t, x, variance_noise=noise[i + 1])[0]
        return x


class WalkPrior:
    """Standard normal vectors."""

    def __init__(self, dim: int = 2, steps: int = 4) -> None:
        self.pipe, self.dims, self.steps = WalkPipeline(dim, steps), (dim,), steps
        self.device = torch.device("cpu")

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"batch": len(prompts)}

    def features(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 0)

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0.detach().float()

    def attach(self, *, seed: int) -> None:
        self.pipe.shifts = nn.Parameter(torch.zeros(self.steps, *self.dims))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.pipe.shifts is None else {"shifts": self.pipe.shifts}

    @contextmanager
    def as_prior(self) -> Iterator[None]:
        before, self.pipe.posterior_on = self.pipe.posterior_on, False
        try:
            yield
        finally:
            self.pipe.posterior_on = before

    def fingerprint(self) -> dict[str, Any]:
        return {"family": "walk", "dims": list(self.dims), "steps": self.steps}

    def export(self, folder: Path, card: str) -> None:
        assert self.pipe.shifts is not None
        (folder / "shifts.json").write_text(json.dumps(self.pipe.shifts.tolist()))
        (folder / "README.md").write_text(card)

    def exact_target(self, reward: Reward, beta: float) -> ExactTarget:
        """Of r(x) = the first coordinate: N(beta·e_1, 1), log Z = beta²/2."""
        towards = torch.zeros(self.dims, dtype=torch.float64)
        towards[0] = beta

        def sample(count: int, generator: torch.Generator) -> Tensor:
            return towards + torch.randn(count, *self.dims, generator=generator, dtype=torch.float64)

        return ExactTarget(beta**2 / 2, sample)


def first(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """The first coordinate."""
    return x[:, 0]
