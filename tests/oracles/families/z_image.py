"""Z-Image: latents of 64 x 64 pixels as (4, 8, 8), always in float32, and prompts of different lengths as a list.

A list of prompts comes back changed: the pipeline writes its chat template into it, so a second call with the same list samples
another prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.oracles.families._texts import qwen_3_encoder, qwen_tokenizer
from tests.oracles.tiny import WIDTH, tiny_vae

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 64}


def build() -> ZImagePipeline:
    torch.manual_seed(0)
    return ZImagePipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen_3_encoder(),
        tokenizer=qwen_tokenizer(),
    )


def transformer() -> ZImageTransformer2DModel:
    found: ZImageTransformer2DModel = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    ).eval()
    return found
