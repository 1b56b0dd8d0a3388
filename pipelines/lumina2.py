"""Lumina-Image 2.0 as prior and posterior: a stock `Lumina2Pipeline`, made stochastic, with a LoRA.

The network predicts the velocity of a flow, so the sampler is `FlowMatchSDEScheduler`, at the noise level without memory.
`guidance` is the pipeline's `guidance_scale`, made for about 4, and normalises what it answers to the length of the prompt's
own (`cfg_normalization`): an ordinary chain of Gaussian transitions all the same. Prompts are encoded behind the pipeline's
system prompt.

Qin et al., 2025, https://arxiv.org/abs/2503.21758
"""

from __future__ import annotations

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import MASKED, TextToImage
from pipelines._models.proof import Parts

__all__ = ["Lumina2"]


class Lumina2(TextToImage):
    """Lumina-Image 2.0 as a `Prior`; see `TextToImage` for its arguments."""

    family = "lumina2"
    pipeline = "Lumina2Pipeline"
    published = "Alpha-VLLM/Lumina-Image-2.0"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = MASKED
    multiple = 16
