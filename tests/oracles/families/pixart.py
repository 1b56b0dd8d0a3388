"""PixArt-Sigma in the layout of PixArt-alpha/PixArt-Sigma-XL-2-512-MS, and Alpha: T5 and a predicted variance."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.oracles.families._texts import t5_encoder, t5_tokenizer
from tests.oracles.tiny import WIDTH, tiny_vae

PROMPTS = ("a cat emoji", "a red dog")


def tiny_pixart() -> PixArtTransformer2DModel:
    transformer: PixArtTransformer2DModel = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    ).eval()
    return transformer


def build(kind: type[PixArtSigmaPipeline] | type[PixArtAlphaPipeline] = PixArtSigmaPipeline) -> PixArtSigmaPipeline:
    torch.manual_seed(0)
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=tiny_vae(),
        transformer=tiny_pixart(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2),
    )


def build_alpha() -> PixArtAlphaPipeline:
    return build(PixArtAlphaPipeline)
