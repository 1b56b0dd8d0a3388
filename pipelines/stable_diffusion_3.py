"""Stable Diffusion 3 and 3.5 as prior and posterior: a stock `StableDiffusion3Pipeline`, made stochastic, with a LoRA.

The network predicts the velocity of a flow, so the sampler is `FlowMatchSDEScheduler`, at the noise level without memory; its
sigmas avoid the stock schedule's last step of deviation 0.001. `guidance` is the pipeline's `guidance_scale`. A folder may lack
the third text encoder (T5), as many do to save memory: the pipeline then gives zeros for it.

Esser et al., 2024, https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

from pathlib import Path

from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["StableDiffusion3"]


class StableDiffusion3(TextToImage):
    """Stable Diffusion 3 medium, 3.5 medium or 3.5 large as a `Prior`; see `TextToImage` for its arguments."""

    family = "stable_diffusion_3"
    pipeline = "StableDiffusion3Pipeline"
    published = "stabilityai/stable-diffusion-3.5-medium"
    parts = Parts(
        ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
        {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"},
        optional=("text_encoder_3", "tokenizer_3"),
    )
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    multiple = 16
    without = ("image_encoder", "feature_extractor")

    def check_files(self, folder: Path) -> None:
        """Refuse a size with more patches than the network has positions for."""
        config = read_json(folder / "transformer" / "config.json")
        levels = len(read_json(folder / "vae" / "config.json").get("block_out_channels", (1, 2, 3, 4)))
        most = int(config.get("pos_embed_max_size", 96)) * int(config.get("patch_size", 2)) * 2 ** (levels - 1)
        if self._size and max(self._size.values()) > most:
            raise ValueError(
                f"height={self._size['height']} and width={self._size['width']}: it has positions for at most {most} pixels "
                f"a side. Set both to at most {most}."
            )
