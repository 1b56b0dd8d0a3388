"""Wan text-to-video as prior and posterior: a stock `WanPipeline`, made stochastic, with a LoRA.

A state is the latents of a whole video, (channels, frames, height, width), and one trajectory denoises all of them. Rewards
judge pictures, so `frames` says which of a video they see: one of its frames, or "all", below each other in one tall picture,
the first at the top. `rewards/frames.py` cuts that up again and averages any reward over them:

    prior: {component: wan, num_frames: 17, frames: all}
    reward: {component: frames, count: 17, reward: {component: aesthetic}}

The network predicts the velocity of a flow, so the sampler is `FlowMatchSDEScheduler`, at the noise level without memory.
`guidance` is the pipeline's `guidance_scale`; the model was made for about 5.

Wan Team, 2025, https://arxiv.org/abs/2503.20314
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Unpack

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.settings import TextSettings
from pipelines._diffusers.text_to_image import TextToImage
from pipelines._models.proof import Parts

__all__ = ["Wan"]

PER_LATENT = 4
"""Frames of a latent one, but for the first, which is a frame of its own."""


class Wan(TextToImage):
    """Wan 2.1, or 2.2 of one network (TI2V-5B), text to video, as a `Prior`.

    Args:
        path: A diffusers folder or a hub id.
        num_frames: Of a video: 1, 5, 9, …; 81 by default, as the pipeline's. 1 draws pictures.
        frames: Which frames a reward sees: "first", "middle", "last", or "all", below each other.
        **settings: See `TextToImage`; height and width are the pipeline's 480 and 832 by default.

    Raises:
        ValueError: see `TextToImage`; num_frames is not one more than a multiple of 4; or the folder has two denoisers (Wan 2.2
            A14B), of which each draws a part of the steps.
    """

    family = "wan"
    pipeline = "WanPipeline"
    published = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    parts = Parts(("vae", "transformer", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "transformer"
    targets = ATTENTION
    sampler = "FlowMatchSDEScheduler"
    predicts = "flow_prediction"
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    multiple = 16
    answers = "frames"

    def __init__(
        self,
        path: str | None = None,
        *,
        num_frames: int = 81,
        frames: Literal["first", "middle", "last", "all"] = "middle",
        **settings: Unpack[TextSettings],
    ) -> None:
        if num_frames < 1 or num_frames % PER_LATENT != 1:
            below = max((num_frames - 1) // PER_LATENT, 0) * PER_LATENT + 1
            raise ValueError(
                f"num_frames={num_frames}: a video has 1, 5, 9, … frames, as the autoencoder keeps the first and packs "
                f"{PER_LATENT} of the others into one latent. Set num_frames: {below} or {below + PER_LATENT}."
            )
        self.num_frames, self.frames = num_frames, frames
        super().__init__(path, **settings)

    def check_files(self, folder: Path) -> None:
        """Refuse models of two denoisers: an adapter in one of them would tune a part of the steps only."""
        index = read_json(folder / "model_index.json")
        if (index.get("transformer_2") or [None])[0] is not None or index.get("boundary_ratio") is not None:
            raise ValueError(
                f"{folder} has two denoisers, transformer and transformer_2, each for a part of the steps (Wan 2.2 A14B): this "
                "prior trains one network. Use a Wan 2.1 or Wan 2.2 TI2V-5B."
            )

    def settings(self) -> dict[str, Any]:
        """Steps, guidance, size and frames, as arguments of the pipeline's call."""
        return super().settings() | {"num_frames": self.num_frames}

    def decode_with_gradient(
        self, x_0: Float[Tensor, "batch channels latents rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], float32: a frame of each video, or all of them below each other; what the pipeline itself answers."""
        videos = super().decode_with_gradient(x_0)  # (batch, frames, 3, height, width)
        if self.frames == "all":
            return videos.transpose(1, 2).flatten(2, 3)
        count = videos.shape[1]
        return videos[:, {"first": 0, "middle": count // 2, "last": count - 1}[self.frames]]

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with; which frames the reward sees too."""
        return super().fingerprint() | {"frames": self.frames}
