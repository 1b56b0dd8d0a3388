"""Qwen-Image: packed latents of a video autoencoder, a vision-language model as text encoder, a mask of the prompt's tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.oracles.families._texts import qwen_2_5_vl, qwen_tokenizer
from tests.oracles.tiny import WIDTH

SETTINGS: dict[str, Any] = {"height": 64, "width": 64}


def build() -> QwenImagePipeline:
    torch.manual_seed(0)
    return QwenImagePipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[1.1, 1.2, 1.3, 1.4],
        ).eval(),
        text_encoder=qwen_2_5_vl(),
        tokenizer=qwen_tokenizer(),
    )


def transformer() -> QwenImageTransformer2DModel:
    found: QwenImageTransformer2DModel = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    for block in found.transformer_blocks:  # most of the tokens are the template's, and the same for all prompts
        torch.nn.init.normal_(block.attn.add_v_proj.weight, std=3.0)
    return found
