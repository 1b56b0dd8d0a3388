"""A class-conditional latent model in the layout of facebook/DiT-XL-2-256: it predicts its variance, which the pipeline drops."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.oracles.tiny import tiny_vae

PROMPTS = ("207", "white shark")


def build() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()
    with torch.no_grad():  # the libraries' own start tells no class from another
        for name, weight in transformer.named_parameters():
            if "norm1" in name or "proj_out_1" in name:
                weight.normal_(std=0.3)
    labels = {str(i): name for i, name in ((2, "great white shark, white shark"), (207, "golden retriever"))}
    scheduler = DDIMScheduler(clip_sample=False, beta_start=0.0001, beta_end=0.02)
    pipe = DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=scheduler, id2label=labels)
    pipe.register_to_config(id2label=labels)  # the published model_index.json has it, save_pretrained leaves it out
    return pipe
