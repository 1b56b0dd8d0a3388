"""Wan 2.1 in the layout of Wan-AI/Wan2.1-T2V-1.3B-Diffusers: UMT5, a causal video autoencoder, latents (channels, frames, h, w)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from tests.oracles.families._gemma import umt5_encoder
from tests.oracles.families._texts import t5_tokenizer
from tests.oracles.tiny import WIDTH

PROMPTS = ("a cat emoji", "a red dog")
SETTINGS = {"num_frames": 5, "height": 16, "width": 16}


def seen(videos: Tensor) -> Tensor:
    """What a reward sees of (batch, 5 frames, 3, height, width) unless told otherwise: the frame in the middle."""
    return videos[:, 2]


def build() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():  # the library's own start hardly hears the prompt
        for name, weight in transformer.named_parameters():
            if "attn2" in name or "text_embedder" in name or "proj_out" in name:
                weight.normal_(std=0.3)
    vae = AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.1, 0.2, 0.0, 0.3],
        latents_std=[1.2, 0.8, 1.0, 1.5],
    ).eval()
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )
