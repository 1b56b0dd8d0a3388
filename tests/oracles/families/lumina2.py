"""Lumina 2 in the layout of Alpha-VLLM/Lumina-Image-2.0: Gemma 2 behind a system prompt, and a flow."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.oracles.families._gemma import gemma_encoder, gemma_tokenizer
from tests.oracles.tiny import WIDTH, tiny_vae

PROMPTS = ("a cat emoji", "a red dog")


def build() -> Lumina2Pipeline:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    ).eval()
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )
