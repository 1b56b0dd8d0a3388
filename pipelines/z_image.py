"""Z-Image as prior and posterior: a stock `ZImagePipeline`, made stochastic, with a LoRA.

`guidance` g is, as for every family, the scale of classifier-free guidance at which 1 is none: u + g·(u(prompt) - u), with u for
the negative prompt. The pipeline counts from 0: its `guidance_scale` is g - 1, so that a recipe's 4.0 is guidance: 5.0 here, and
Z-Image-Turbo's 0.0 is guidance: 1.0.

The network predicts the velocity of a flow: `FlowMatchSDEScheduler` at the noise level without memory, on the pipeline's own
sigmas. States are float32 whatever the networks' dtype. The stock pipeline writes its chat template into a list of prompts that it
is given, so that a second call with the same list samples other prompts; here each prompt is encoded once, from its text.

Z-Image team, Alibaba, 2025, https://arxiv.org/abs/2511.22699
"""

from __future__ import annotations

from typing import Any

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["ZImage"]


class ZImage(TextToImage):
    """Z-Image or Z-Image-Turbo as a `Prior`; see `TextToImage` for its arguments."""

    family = "z_image"
    pipeline = "ZImagePipeline"
    published = "Tongyi-MAI/Z-Image-Turbo"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    multiple = 16

    def settings(self) -> dict[str, Any]:
        """Steps, guidance and size, as arguments of the pipeline's call, which counts guidance from 0."""
        return super().settings() | {"guidance_scale": self.guidance.scale - 1}
