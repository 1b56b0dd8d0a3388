"""Complete diffusers pipelines with random weights, a few hundred kB each: every test runs the real thing on them.

The tokenizer knows the 256 bytes and no merges, so every prompt is spelled out and two prompts never share their ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffusion_rtb.schedulers import FlowMatchSDEScheduler

WIDTH = 16
"""Length of one token's embedding."""

START, END = "<|startoftext|>", "<|endoftext|>"


def fresh(make: Callable[..., Any]) -> Callable[..., Any]:
    """Made once, and a copy for each who asks: a token added to a shared one would change the weights of all later pipelines."""
    made = lru_cache(make)

    @wraps(make)
    def copied(*args: Any) -> Any:
        return copy.deepcopy(made(*args))

    return copied


@fresh
def tiny_tokenizer() -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def tiny_text_encoder() -> CLIPTextModel:
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        # The default 0.02 makes all prompts look alike to a random network.
        initializer_factor=10.0,
    )
    return CLIPTextModel(config).eval()


def tiny_unet() -> UNet2DConditionModel:
    """A conditional UNet on (4, 8, 8) latents with one attention block in each direction and in the middle."""
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    ).eval()
    return unet


def tiny_vae(**arguments: Any) -> AutoencoderKL:
    """An image autoencoder, 64 x 64 pixels to (4, 8, 8) latents."""
    vae: AutoencoderKL = AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        **({"mid_block_add_attention": False} | arguments),
    ).eval()
    return vae


def tiny_ddim(prediction_type: str = "epsilon", **arguments: Any) -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x, or of 2.x with prediction_type "v_prediction"."""
    stable_diffusion = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(prediction_type=prediction_type, **(stable_diffusion | arguments))


def tiny_stable_diffusion(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline: text to 64 x 64 pixels through (4, 8, 8) latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(),
            scheduler=tiny_ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny(
    folder: Path | str, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0
) -> Path:
    """Write `tiny_stable_diffusion` as a diffusers folder and return the folder."""
    tiny_stable_diffusion(prediction_type, seed).save_pretrained(folder)
    return Path(folder)


def tiny_stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:
    """A flow-matching pipeline on (4, 8, 8) latents without text encoders: call it with `**tiny_3_arguments(batch)`.

    Its scheduler is made stochastic, as sampling by the stock one is an ordinary differential equation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
        ).eval()
        vae = tiny_vae(shift_factor=0.0)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchSDEScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_3_arguments(batch: int, steps: int = 4, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for `tiny_stable_diffusion_3()(...)`: random embeddings, 64 x 64 pixels, guidance 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, batch, 5, WIDTH, generator=generator)
    pooled = torch.randn(2, batch, WIDTH, generator=generator)
    return {
        "prompt_embeds": tokens[0],
        "negative_prompt_embeds": tokens[1],
        "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1],
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }


def tiny_unconditional_unet() -> UNet2DModel:
    """A UNet without conditioning on (3, 8, 8) images."""
    unet: UNet2DModel = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    return unet


def tiny_ddpm(seed: int = 0, **scheduler: Any) -> DDPMPipeline:
    """An unconditional pixel-space pipeline with ancestral sampling, images of 8 x 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = DDPMPipeline(unet=tiny_unconditional_unet(), scheduler=DDPMScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ddim_pipeline(seed: int = 0, **scheduler: Any) -> DDIMPipeline:
    """The same network with DDIM; call it with eta=1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = DDIMPipeline(unet=tiny_unconditional_unet(), scheduler=DDIMScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe
