"""FLUX.1: packed latents, 16 channels each for 2 x 2 of the 8 x 8, dynamic shifting, and the scale of a guidance distilled into
the network as one of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.oracles.families._texts import clip_encoder, t5_encoder, t5_tokenizer
from tests.oracles.tiny import WIDTH, tiny_tokenizer, tiny_vae

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 64}


def build() -> FluxPipeline:
    torch.manual_seed(0)
    return FluxPipeline(**components())


def components() -> dict[str, Any]:
    """Of every pipeline of FLUX.1."""
    return {
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": clip_encoder(),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
    }
