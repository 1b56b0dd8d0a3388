"""Stable Diffusion 3: three text encoders, a flow transformer on (4, 8, 8) latents, a shift of the latents in the autoencoder."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.oracles.families._texts import clip_encoder_with_projection, t5_encoder, t5_tokenizer
from tests.oracles.tiny import WIDTH, tiny_tokenizer, tiny_vae

SETTINGS = {"max_sequence_length": 64}


def build() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder_with_projection(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clip_encoder_with_projection(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def transformer() -> SD3Transformer2DModel:
    found: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    return found
