"""Sana as prior and posterior: a stock `SanaPipeline`, made stochastic, with a LoRA.

The network predicts the velocity of a flow, so the sampler is `FlowMatchSDEScheduler`, at the noise level without memory.
`guidance` is the pipeline's `guidance_scale`; the model was made for about 4.5. Prompts are encoded behind the pipeline's own
instruction to Gemma ("complex human instruction"), as a plain call does. Sizes are drawn as asked for: the pipeline's way of
drawing the nearest size of a table and cropping it (`use_resolution_binning`) is off.

Xie et al., 2024, https://arxiv.org/abs/2410.10629
"""

from __future__ import annotations

from typing import Any, ClassVar

from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.settings import own_size
from pipelines._diffusers.text_to_image import MASKED, TextToImage
from pipelines._models.proof import Parts

__all__ = ["Sana"]


class Sana(TextToImage):
    """Sana 0.6B, 1.6B or 4.8B (not Sprint, which is distilled to two steps) as a `Prior`; see `TextToImage` for its arguments."""

    family = "sana"
    pipeline = "SanaPipeline"
    published = "Efficient-Large-Model/Sana_600M_512px_diffusers"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = MASKED
    no_negative = ""
    call: ClassVar = {"use_resolution_binning": False, "negative_prompt": None}
    multiple = 32

    def settings(self) -> dict[str, Any]:
        """Steps, guidance and size, as arguments of the pipeline's call, whose own size is 1024 pixels for every model."""
        height, width = own_size(self.network, self.pipe.vae_scale_factor)
        return {"height": height, "width": width} | super().settings()
