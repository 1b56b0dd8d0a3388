"""Sana in the layout of Efficient-Large-Model/Sana_600M_512px_diffusers: Gemma 2, a deep-compression autoencoder, a flow."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.oracles.families._gemma import gemma_encoder, gemma_tokenizer
from tests.oracles.tiny import WIDTH

PROMPTS = ("a cat emoji", "a red dog")


def tiny_dc_vae() -> AutoencoderDC:
    """32 x 32 pixels to (4, 8, 8) latents."""
    blocks = {"block_types": ("ResBlock",) * 3, "block_out_channels": (4, 4, 4), "layers_per_block": (1, 1, 1)}
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in blocks.items()}
    both |= {f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")}
    return AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **both).eval()


def build() -> SanaPipeline:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
    ).eval()
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=tiny_dc_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
