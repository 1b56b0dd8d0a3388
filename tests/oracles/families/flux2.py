"""FLUX.2 klein: packed latents whose `latents` argument is not packed, and hidden states of three layers of a language model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

from tests.oracles.families._texts import qwen_3, qwen_tokenizer
from tests.oracles.tiny import WIDTH

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 64}


def build(*, is_distilled: bool = False) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    return Flux2KleinPipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=qwen_3(),
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
    )


def transformer() -> Flux2Transformer2DModel:
    found: Flux2Transformer2DModel = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=WIDTH,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    ).eval()
    for layer in (found.double_stream_modulation_img.linear, found.single_stream_modulation.linear, found.proj_out):
        torch.nn.init.normal_(layer.weight, std=0.5)  # at the library's own start the blocks hardly matter
    return found


def autoencoder() -> AutoencoderKLFlux2:
    vae: AutoencoderKLFlux2 = AutoencoderKLFlux2(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae
