"""FLUX.1 as prior and posterior: a stock `FluxPipeline`, or `FluxKontextPipeline`, made stochastic, with a LoRA.

FLUX.1-dev has two guidances, and they are different things. *Distilled*: the network was trained to answer as a guided one would,
and takes the scale as an input, like a timestep; that is `distilled_guidance`, the pipeline's `guidance_scale`, and costs nothing.
*True* classifier-free guidance, a second evaluation of the network for a negative prompt, is `guidance`, the pipeline's
`true_cfg_scale`; 1 is none and the default. Each of them is part of the prior. FLUX.1-schnell takes no scale.

The network predicts the velocity of a flow: `FlowMatchSDEScheduler` at the noise level without memory, on the pipeline's own
sigmas, shifted by the size of the picture. States are packed, (tokens, channels): a token is 2 x 2 latents.

Black Forest Labs, 2024, https://github.com/black-forest-labs/flux; guidance distillation: Meng et al., 2022,
https://arxiv.org/abs/2210.03142
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.settings import TextSettings
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["Flux"]


class Flux(TextToImage):
    """FLUX.1 dev, schnell, Krea or Kontext as a `Prior`; see `TextToImage` for its other arguments.

    Args:
        path: A diffusers folder or a hub id.
        distilled_guidance: The scale that the network takes as an input, 3.5 by default; only where it takes one.

    Raises:
        ValueError: `distilled_guidance` is negative, or given to a network without that input; see also `TextToImage`.
    """

    family = "flux"
    pipeline = "FluxPipeline"
    also = ("FluxKontextPipeline",)
    published = "black-forest-labs/FLUX.1-dev"
    parts = Parts(
        ("vae", "transformer", "text_encoder", "text_encoder_2"),
        {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    )
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", "pooled_prompt_embeds", None)
    guidance_argument = "true_cfg_scale"
    no_negative = ""
    multiple = 16
    without = ("image_encoder", "feature_extractor")

    def __init__(
        self, path: str | None = None, *, distilled_guidance: float | None = None, **settings: Unpack[TextSettings]
    ) -> None:
        if distilled_guidance is not None and not 0 <= distilled_guidance < float("inf"):
            raise ValueError(f"distilled_guidance={distilled_guidance}: it is a number >= 0, for example 3.5.")
        self.distilled_guidance = distilled_guidance
        super().__init__(path, **settings)

    def check_files(self, folder: Path) -> None:
        """Refuse a scale that the network would never see."""
        where = folder / "transformer" / "config.json"
        if read_json(where).get("guidance_embeds"):
            self.distilled_guidance = 3.5 if self.distilled_guidance is None else self.distilled_guidance
        elif self.distilled_guidance is not None:
            raise ValueError(
                f"distilled_guidance={self.distilled_guidance}, but {where} says guidance_embeds: false (FLUX.1-schnell): this "
                "network takes no such scale. Leave distilled_guidance out."
            )

    def settings(self) -> dict[str, Any]:
        """Steps, both guidances and size, as arguments of the pipeline's call."""
        own = {} if self.distilled_guidance is None else {"guidance_scale": self.distilled_guidance}
        return super().settings() | own

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, both guidances too."""
        return super().fingerprint() | {"distilled_guidance": self.distilled_guidance}
