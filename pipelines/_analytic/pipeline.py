"""A `DiffusionPipeline` that draws vectors (batch, dim): any denoiser in closed form, any stock scheduler.

It is a pipeline as those of images are: the recorder wraps its scheduler, replay goes through its `__call__`, and
`save_pretrained` and `from_pretrained` work. Only this module and the denoisers import diffusers, so importing a prior does not.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.chain.seeds import trajectory_noise

__all__ = ["VectorDenoiser", "VectorOutput", "VectorPipeline"]


@dataclass
class VectorOutput(BaseOutput):  # type: ignore[misc]
    """What the pipeline answers."""

    vectors: Tensor
    """(batch, dim), in data units, or in the chain's for output_type="latent"."""


class VectorDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    r"""The prior's noise predictor in closed form, plus a trainable correction u(x_t, t) that makes it the posterior's.

        prediction = noise(x_t, alpha_bar_t) + gain_t · u(x_t, t)        gain_t = std_t / (d mean_t / d prediction)

    so that the mean of a transition moves by std_t · u: u is in standard deviations of its step, log_q - log_p is
    u·z - |u|²/2 + ..., and one learning rate fits all steps. u starts at 0; without it, or inside the prior's `as_prior`,
    the network is the prior. A step without noise has gain 0, so it stays the same map for both; where all steps are without, by
    eta 0, gains are those of eta 1.

    A subclass has `noise`, sets `correction`, and names the arguments of its constructor in its config. The chain
    sees standardised vectors, x = (data - shift) / scale, which have mean 0 and mean variance 1.
    """

    correction: nn.Module | None
    posterior_on: bool
    shift: Tensor
    scale: Tensor
    alpha_bar: Tensor
    gain: Tensor

    def prepare(self, steps: int, **constants: Tensor) -> None:
        """Create what every denoiser has: shift, scale and its own constants; `follow` fills in what belongs to the scheduler.

        They are computed in float64 and kept in torch's default dtype, which `from_pretrained(..., dtype=...)` sets.
        """
        self.posterior_on = True
        self.correction = None
        for name, constant in constants.items():
            self.register_buffer(name, constant.to(torch.get_default_dtype()))
        self.register_buffer("alpha_bar", torch.ones(steps + 1))
        self.register_buffer("gain", torch.zeros(steps + 1))

    @torch.no_grad()
    def follow(self, alpha_bar: Float[Tensor, " steps_and_one"], gain: Float[Tensor, " steps_and_one"]) -> None:
        """Set the tables that belong to a noise schedule, by scheduler timestep."""
        self.alpha_bar.copy_(alpha_bar)
        self.gain.copy_(gain)

    @property
    def dim(self) -> int:
        """Numbers in one vector."""
        return len(self.shift)

    def noise(self, x_t: Float[Tensor, "batch dim"], alpha_bar: Float[Tensor, ""]) -> Float[Tensor, "batch dim"]:
        """E[noise | x_t] for x_t = sqrt(alpha_bar)·x + sqrt(1 - alpha_bar)·noise, x from the prior."""
        raise NotImplementedError

    def forward(self, x_t: Float[Tensor, "batch dim"], timestep: Any) -> Float[Tensor, "batch dim"]:
        """Predicted noise of the posterior, or of the prior where there is no correction or it is off."""
        predicted = self.noise(x_t, self.alpha_bar[timestep])
        if self.correction is None or not self.posterior_on:
            return predicted
        return predicted + self.gain[timestep] * self.corrected(x_t, timestep, predicted)

    def corrected(
        self, x_t: Float[Tensor, "batch dim"], timestep: Any, predicted: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch dim"]:
        """u of this state; a subclass may show its correction what the prior predicts there."""
        assert self.correction is not None
        u: Tensor = self.correction(x_t, timestep)
        return u

    def data_units(self, x_0: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """shift + scale·x_0."""
        return self.shift + self.scale * x_0


class VectorPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Sample vectors; `denoiser` predicts the noise, `scheduler` is stock.

        x = pipe(batch_size=1000, num_inference_steps=100, eta=1.0).vectors

    Args:
        denoiser: A `VectorDenoiser`.
        scheduler: `DDIMScheduler` or `DDPMScheduler` with epsilon prediction and without clipping.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 100,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "batch dim"] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> VectorOutput | tuple[Tensor]:
        """Denoise `batch_size` vectors.

        Args:
            batch_size: How many.
            num_inference_steps: Steps T.
            eta: Noise level of DDIM; 1 is stochastic as DDPM. Schedulers without one ignore it.
            generator: One for all, or one per vector: then a vector depends on its generator only, not on its batch.
            latents: x_T; drawn where None.
            output_type: "pt" for data units, "latent" for the chain's.
            return_dict: False answers a tuple.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size {batch_size}: give one per vector, or one.")
        scheduler, device = self.scheduler, self.denoiser.device
        scheduler.set_timesteps(num_inference_steps, device=device)
        taken = inspect.signature(scheduler.step).parameters
        offered: dict[str, Any] = {"eta": eta, "generator": generator}
        options = {name: value for name, value in offered.items() if name in taken}
        noise = None
        if isinstance(generator, list) and "variance_noise" in taken:
            steps, network = len(scheduler.timesteps), self.denoiser
            noise = trajectory_noise(generator, steps, (network.dim,), dtype=network.dtype, device=network.device)
            del options["generator"]
        x = self._start(batch_size, generator, noise) if latents is None else latents
        x = x * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            if noise is not None:
                options["variance_noise"] = noise[i + 1]
            predicted = self.denoiser(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(predicted, t, x, return_dict=False, **options)[0]
        if output_type != "latent":
            x = self.denoiser.data_units(x)
        return VectorOutput(vectors=x) if return_dict else (x,)

    def _start(self, batch_size: int, generator: Any, noise: Tensor | None) -> Float[Tensor, "batch dim"]:
        if noise is not None:
            return noise[0]
        shape = (batch_size, self.denoiser.dim)
        x: Tensor = randn_tensor(shape, generator=generator, device=self.denoiser.device, dtype=self.denoiser.dtype)
        return x
