"""The `emoji_flow` prior: a small Stable Diffusion 3, trained as a rectified flow on the emoji prior's latents.

Autoencoder and text encoders are those of the exported `emoji` and `emoji-clip`, frozen; only the transformer is trained.

Rectified flow: Liu et al., 2022, https://arxiv.org/abs/2209.03003; MM-DiT: Esser et al., 2024, https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.emoji.build import encoders, vae
from pipelines.emoji.build.captions import Captions
from pipelines.emoji.build.drawings import Drawings
from pipelines.emoji.build.learning.training import Training, load_average
from pipelines.emoji.build.weighed import Weighed

log = logging.getLogger(__name__)

PATCH, LAYERS, HEADS, HEAD_WIDTH = 2, 4, 6, 32
BATCH, RATE = 64, 1.2e-3
NOISY = 0.7  # t = u^0.7, as in the emoji prior: a little more practice at high noise
ZEROS = 256  # the pipeline's default `max_sequence_length`


@dataclass(frozen=True)
class Cache:
    """What the training reads, computed once by the pipeline itself.

    latents  (views, names, styles, colours, 4, 8, 8), mean 0 and variance 1 over all
    tokens   (captions, 16, features) embeddings, without the zeros that stand for T5
    pooled   (captions, features)
    shift    of the autoencoder's config: latent = (z - shift) * scale
    scale
    """

    latents: Tensor
    tokens: Tensor
    pooled: Tensor
    shift: Tensor
    scale: Tensor

    @staticmethod
    @torch.no_grad()
    def load(drawings: Drawings, work: Path, prior: Path, clip: Path) -> Cache:
        """From `work/flow_cache.safetensors`, made on the first call (about a minute)."""
        file = work / "flow_cache.safetensors"
        if not file.exists():
            model = AutoencoderKL.from_pretrained(prior / "vae").eval().to(memory_format=torch.channels_last)
            z = vae.encode(drawings, model)
            pipe = _pipeline(model, prior, clip, transformer=None)
            tokens, pooled = _embeddings(pipe, Captions().texts)
            shift, scale = z.mean(), 1 / z.std()
            log.info("latents: shift %.3f, scale %.3f", shift, scale)
            latents = (z - shift) * scale
            save_file({"latents": latents, "tokens": tokens, "pooled": pooled, "shift": shift, "scale": scale}, file)
        return Cache(**load_file(file))


def _embeddings(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token embeddings of both encoders side by side, and their pooled ones, as the pipeline makes them."""
    both = [pipe._get_clip_prompt_embeds(texts, device="cpu", clip_model_index=i) for i in (0, 1)]
    return torch.cat([tokens for tokens, _ in both], -1), torch.cat([pooled for _, pooled in both], -1)


def _pipeline(
    model: AutoencoderKL, prior: Path, clip: Path, transformer: SD3Transformer2DModel | None
) -> StableDiffusion3Pipeline:
    first, second = encoders.tokenizers()
    return StableDiffusion3Pipeline(
        vae=model,
        text_encoder=encoders.of_prior(prior, first),
        tokenizer=first,
        text_encoder_2=encoders.of_clip(clip, second),
        tokenizer_2=second,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),  # shift 1: a quarter of a picture's 64 pixels needs none
    )


def create(features: int, pooled: int) -> SD3Transformer2DModel:
    """The untrained transformer; modulations and the last layer begin at zero, so every block begins as the identity."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=features,
        pooled_projection_dim=pooled,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or ".norm1" in name or name.startswith("norm_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def train(cache: Cache, work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/flow.safetensors`.

    With x_t = (1 - t) x_0 + t e the loss is the mean squared error of the velocity e - x_0.
    """
    torch.manual_seed(0)
    model = create(cache.tokens.shape[-1], cache.pooled.shape[-1])
    attention = Weighed()
    model.set_attn_processor(attention)
    run = Training(model, work / "flow.safetensors", minutes=minutes, lr=RATE, decay=0.998, largest=1000)
    torch.manual_seed(1 + run.steps)
    captions, sizes = Captions(), np.array(cache.latents.shape[:4])
    tokens = F.pad(cache.tokens, (0, 0, 0, 1))  # one zero vector for all that stand for T5
    while not run.done:
        view, name, style, colour = (torch.randint(size, (BATCH,)) for size in sizes.tolist())
        t = ((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH) ** NOISY  # stratified
        x0, e = cache.latents[view, name, style, colour], torch.randn(BATCH, 4, 8, 8)
        level = t[:, None, None, None]
        chosen = captions.draw(name, style, colour)
        attention.count = torch.where(torch.rand(BATCH) < 0.5, ZEROS, ZEROS ** torch.rand(BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            v = model((1 - level) * x0 + level * e, tokens[chosen], cache.pooled[chosen], 1000 * t).sample
        run.step((v.float() - (e - x0)).square().mean())


def trained(work: Path, cache: Cache) -> tuple[SD3Transformer2DModel, int]:
    """The averaged weights and the number of training steps behind them."""
    model = create(cache.tokens.shape[-1], cache.pooled.shape[-1])
    steps = load_average(model, work / "flow.safetensors")
    return model.requires_grad_(False).eval(), steps


def pipeline(cache: Cache, work: Path, prior: Path, clip: Path) -> StableDiffusion3Pipeline:
    """The prior as a Stable Diffusion 3 pipeline in single precision, without T5."""
    transformer, steps = trained(work, cache)
    log.info("transformer at step %d", steps)
    autoencoder = AutoencoderKL.from_pretrained(prior / "vae").eval()
    autoencoder.register_to_config(shift_factor=float(cache.shift), scaling_factor=float(cache.scale))
    return _pipeline(autoencoder, prior, clip, transformer)
