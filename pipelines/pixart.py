"""PixArt-Alpha and PixArt-Sigma as prior and posterior: a stock pipeline of either, made stochastic, with a LoRA.

The network predicts noise, and its variance besides, which the pipeline drops: the sampler is DDIM with eta 1. `guidance` is
the pipeline's `guidance_scale`; the models were made for about 4.5. Prompts are encoded as they are written: the pipelines'
cleaning of captions depends on what is installed (`clean_caption`), and is off; so is drawing the nearest size of a table
(`use_resolution_binning`).

Chen et al., 2023, https://arxiv.org/abs/2310.00426, and 2024, https://arxiv.org/abs/2403.04692
"""

from __future__ import annotations

from typing import ClassVar

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import MASKED, TextToImage
from pipelines._models.proof import Parts

__all__ = ["PixArt"]


class PixArt(TextToImage):
    """PixArt-Alpha or PixArt-Sigma, whichever the folder is, as a `Prior`; see `TextToImage` for its arguments."""

    family = "pixart"
    pipeline = "PixArtSigmaPipeline"
    also = ("PixArtAlphaPipeline",)
    published = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler_settings: ClassVar = {"clip_sample": False}
    embeds = MASKED
    no_negative = ""
    call: ClassVar = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}
    multiple = 16
