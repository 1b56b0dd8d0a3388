"""FLUX.2 klein as prior and posterior: a stock `Flux2KleinPipeline`, made stochastic, with a LoRA.

`guidance` is the pipeline's `guidance_scale`, true classifier-free guidance that moves away from the empty prompt; the pipeline
takes no other negative prompt. The distilled models (klein-4B, klein-9B) are unguided: their pipeline ignores any scale, which is
refused here; the base models take one.

The network predicts the velocity of a flow: `FlowMatchSDEScheduler` at the noise level without memory, on the pipeline's own
sigmas, shifted by the size of the picture. States are packed, (tokens, channels), while the argument `latents` of the call is not:
a replay lets the pipeline start as it likes and answers its first step with the recorded state, for one more evaluation of the
network.

Black Forest Labs, 2025, https://github.com/black-forest-labs/flux2
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from diffusion_rtb.abilities import Entry
from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.settings import TextSettings
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["Flux2"]


class Flux2(TextToImage):
    """FLUX.2 klein, distilled or base, as a `Prior`; see `TextToImage` for its arguments, of which it lacks `negative_prompt`.

    Raises:
        ValueError: there is a negative prompt, or guidance for a distilled model; see also `TextToImage`.
    """

    family = "flux2"
    pipeline = "Flux2KleinPipeline"
    published = "black-forest-labs/FLUX.2-klein-4B"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = (*ATTENTION, "to_qkv_mlp_proj")  # of the single-stream blocks, which are most of it
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", None)
    multiple = 16
    entry: Entry = "step"

    def __init__(self, path: str | None = None, **settings: Unpack[TextSettings]) -> None:
        if settings.get("negative_prompt"):
            raise ValueError(
                f"negative_prompt={settings['negative_prompt']!r}: FLUX.2 klein's pipeline moves away from the empty prompt and "
                "takes no other. Leave negative_prompt out."
            )
        super().__init__(path, **settings)

    def check_files(self, folder: Path) -> None:
        """Refuse guidance that the pipeline would ignore."""
        if self.guidance.scale > 1 and read_json(folder / "model_index.json").get("is_distilled"):
            raise ValueError(
                f"guidance={self.guidance.scale}, but {folder / 'model_index.json'} says is_distilled: true, and the pipeline "
                "ignores the scale of a distilled model. Set guidance: 1.0, or use a base model such as "
                "black-forest-labs/FLUX.2-klein-base-4B."
            )
