"""Stable Diffusion XL: two text encoders, the second's pooled output, and the picture's size as a condition."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.oracles.families._texts import clip_encoder, clip_encoder_with_projection
from tests.oracles.tiny import WIDTH, tiny_tokenizer, tiny_vae

TIME = 8
"""Length of the embedding of one of the six numbers of original size, crop and target size."""


def build() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder_with_projection(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def unet() -> UNet2DConditionModel:
    found: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME,
        projection_class_embeddings_input_dim=WIDTH + 6 * TIME,
    ).eval()
    return found
