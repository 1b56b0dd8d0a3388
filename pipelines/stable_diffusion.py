"""Stable Diffusion 1.x and 2.x as prior and posterior: a stock `StableDiffusionPipeline`, made stochastic, with a LoRA.

Which prior is tilted with classifier-free guidance, and which without, is in `pipelines._diffusers.guidance`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines._diffusers.kohya import elsewhere, write_kohya
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.posterior import Lora
from pipelines._diffusers.settings import DTYPES, own_size
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts
from pipelines._models.shapes import check_shapes

__all__ = ["StableDiffusion"]


class StableDiffusion(TextToImage):
    """A Stable Diffusion 1.x or 2.x pipeline (epsilon or v prediction) as a `Prior`; see `TextToImage` for its arguments."""

    family = "stable_diffusion"
    pipeline = "StableDiffusionPipeline"
    published = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    parts = Parts(("vae", "unet", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "unet"
    targets = ATTENTION
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    no_negative = ""
    # What the stock pipeline insists on; older configs lack both, and clipping latents ruins them.
    sampler_settings: ClassVar = {"clip_sample": False, "steps_offset": 1}
    without = ("safety_checker", "feature_extractor")
    options: ClassVar = {"requires_safety_checker": False}

    def check_files(self, folder: Path) -> None:
        """Refuse a UNet that a text-to-image pipeline cannot call; see `check_shapes`."""
        check_shapes(folder)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        if self._size:
            return self._size["height"], self._size["width"]
        return own_size(self.network, self.pipe.vae_scale_factor)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape (channels, height, width) of one latent."""
        height, width = self.size
        factor = self.pipe.vae_scale_factor
        return (self.network.config.in_channels, height // factor, width // factor)

    def settings(self) -> dict[str, Any]:
        """Steps, eta, guidance and size, as arguments of the pipeline's call."""
        height, width = self.size
        return super().settings() | {"height": height, "width": width}

    def decode_with_gradient(
        self, x_0: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], float32: what the pipeline itself answers, without its evaluation of the network."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        latents = x_0.to(self.device, DTYPES[self.dtype]) / vae.config.scaling_factor
        images = [
            processor.postprocess(vae.decode(part).sample, output_type="pt").float()
            for part in latents.split(self.decode_batch)
        ]
        return torch.cat(images)

    @torch.no_grad()
    def latents_of(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """Latents of images in [0, 1]: the means of what the autoencoder makes of them, in the chain's units."""
        if tuple(images.shape[2:]) != self.size:
            raise ValueError(
                f"The pictures are {images.shape[3]} x {images.shape[2]} pixels, the prior draws {self.size[1]} x {self.size[0]}: "
                "resize or crop them."
            )
        vae = self.pipe.vae
        mean = vae.encode(images.to(self.device, DTYPES[self.dtype]) * 2 - 1).latent_dist.mean
        latents: Tensor = mean * vae.config.scaling_factor
        return latents

    def export(self, folder: Path, card: str) -> None:
        """Write what every prior does and, of a LoRA, its adapters under kohya's names for others."""
        super().export(folder, card)
        if isinstance(self._posterior, Lora):
            write_kohya(self.network, Path(folder), self._posterior.alpha)

    def elsewhere(self) -> str:
        """For the model card of a LoRA: which exported file is for which program, and the settings to use there."""
        if not isinstance(self._carried, Lora):
            return ""
        sampler = type(self.pipe.scheduler).__name__
        return elsewhere(self.base_model, sampler, self.settings(), "Stable Diffusion 1.x and 2.x")
