"""AuraFlow, which has no family of its own: all that is known of it is looked up."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.oracles.families._gemma import umt5_encoder
from tests.oracles.families._texts import t5_tokenizer
from tests.oracles.tiny import WIDTH, tiny_vae

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 32}
ANY_FOLDER = True


def build() -> AuraFlowPipeline:
    torch.manual_seed(0)
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=tiny_vae(),
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def transformer() -> AuraFlowTransformer2DModel:
    found: AuraFlowTransformer2DModel = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ).eval()
    for name, weight in found.named_parameters():
        if "to_out" in name or "proj_out" in name or "ff" in name:
            torch.nn.init.normal_(weight, std=0.5)  # at the library's own start the blocks hardly matter
    return found
