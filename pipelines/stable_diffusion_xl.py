"""Stable Diffusion XL as prior and posterior: a stock `StableDiffusionXLPipeline`, made stochastic, with a LoRA in its UNet.

The sampler is DDIM with eta 1: ancestral sampling with the DDPM posterior's variance, which has no memory of x_T. `guidance` is the
pipeline's `guidance_scale`; without a negative prompt SDXL moves away from embeddings of zeros, not from those of the empty text.
Both text encoders read the same prompt, up to 77 tokens. Original and target size of the picture, conditions too, are its own.

Podell et al., 2023, https://arxiv.org/abs/2307.01952
"""

from __future__ import annotations

from typing import ClassVar

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["StableDiffusionXL"]


class StableDiffusionXL(TextToImage):
    """A Stable Diffusion XL base model, or one that was distilled from it, as a `Prior`; see `TextToImage` for its arguments."""

    family = "stable_diffusion_xl"
    pipeline = "StableDiffusionXLPipeline"
    published = "stabilityai/stable-diffusion-xl-base-1.0"
    parts = Parts(
        ("vae", "unet", "text_encoder", "text_encoder_2"),
        {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    )
    denoiser = "unet"
    targets = ATTENTION
    embeds = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    sampler_settings: ClassVar = {"clip_sample": False, "steps_offset": 1}
    without = ("image_encoder", "feature_extractor")
    options: ClassVar = {"add_watermarker": False}
