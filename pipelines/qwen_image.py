"""Qwen-Image as prior and posterior: a stock `QwenImagePipeline`, made stochastic, with a LoRA.

`guidance` is the pipeline's `true_cfg_scale`: a second evaluation of the network for a negative prompt, by default a space as in
the model's own examples; the guided velocity of each token is brought back to the length of the unguided one, which is part of the
prior. The pipeline's `guidance_scale` is for distilled models that are not published, and is not passed.

The network predicts the velocity of a flow: `FlowMatchSDEScheduler` at the noise level without memory, on the pipeline's own
sigmas, shifted by the size of the picture. States are packed, (tokens, channels): a token is 2 x 2 latents.

Wu et al., 2025, https://arxiv.org/abs/2508.02324
"""

from __future__ import annotations

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["QwenImage"]


class QwenImage(TextToImage):
    """Qwen-Image as a `Prior`; see `TextToImage` for its arguments."""

    family = "qwen_image"
    pipeline = "QwenImagePipeline"
    published = "Qwen/Qwen-Image"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", "prompt_embeds_mask")
    guidance_argument = "true_cfg_scale"
    no_negative = " "
    multiple = 16
