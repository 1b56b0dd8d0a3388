"""The autoencoder of the `emoji` prior: 64x64 RGB <-> 4x8x8 latents.

The prior's chain ends with noise of standard deviation 0.1 (see `unet.schedule`), so the decoder is trained on noisy latents:
what the chain leaves behind is invisible in the picture. First both halves are trained together; then the encoder is frozen,
the denoiser can start on its latents, and the decoder alone goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.emoji import COLOURS, NAMES, STYLES
from pipelines.emoji.build.drawings import SIZE, Bytes, Drawings, composite, shift
from pipelines.emoji.build.learning.training import Training, load_average

log = logging.getLogger(__name__)

CHANNELS = (16, 32, 64, 128)
BATCH, RATE = 16, 2e-3
NOISE = 0.15  # least standard deviation of the latents the decoder sees
KL_WEIGHT = 1e-5  # per nat; keeps latents near unit variance
DECODER_RATE, DECODER_NOISE = 2e-3, (0.05, 0.2)  # noise of the second phase, relative to the latents' deviation
VIEWS = 2  # cached latents per drawing and colour, each with its own shift and colour jitter


def create() -> AutoencoderKL:
    """The untrained autoencoder (2.7 M parameters)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        norm_num_groups=8,
        sample_size=SIZE,
    )


def pixels(images: Bytes) -> Tensor:
    """(batch, 64, 64, 3) uint8 -> (batch, 3, 64, 64) in [-1, 1], channels last."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def train(drawings: Drawings, work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/vae.safetensors`."""
    torch.manual_seed(0)
    model = create().to(memory_format=torch.channels_last)
    run = Training(model, work / "vae.safetensors", minutes=minutes, lr=RATE, decay=0.99)
    rng = np.random.default_rng(run.steps)
    while not run.done:
        x = pixels(_batch(drawings, rng, others=0.2, reach=2))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            std = posterior.std.float().clamp_min(NOISE)
            y = model.decode(posterior.mean + std * torch.randn_like(std)).sample.float()
        run.step(_reconstruction(y, x) + KL_WEIGHT * posterior.kl().float().mean())


def _batch(drawings: Drawings, rng: np.random.Generator, *, others: float, reach: int) -> Bytes:
    """Pictures (batch, 64, 64, 3); a share `others` is drawn from all names, so that the encoder reads those as well."""
    all_names = rng.integers(0, len(drawings.names), BATCH)
    names = np.where(rng.random(BATCH) < others, all_names, rng.choice(drawings.known, BATCH))
    rgba = shift(drawings.rgba[names, rng.integers(0, len(STYLES), BATCH)], rng, reach=reach)
    return composite(rgba, list(rng.choice(list(COLOURS), BATCH)), rng)


def _reconstruction(y: Tensor, x: Tensor) -> Tensor:
    """Mean squared error, plus a tenth of the mean absolute errors of pixels and of differences between neighbours."""
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.square().mean() + 0.1 * (error.abs().mean() + edges)


def train_decoder(drawings: Drawings, work: Path, minutes: float) -> None:
    """Go on with the decoder alone, on latents noisier than any the chain ends with; checkpoint `work/decoder.safetensors`."""
    torch.manual_seed(0)
    model = trained(work)
    half = _decoder(model).train().requires_grad_(True)
    run = Training(half, work / "decoder.safetensors", minutes=minutes, lr=DECODER_RATE, decay=0.998)
    rng = np.random.default_rng(10_000_000 + run.steps)
    while not run.done:
        x = pixels(_batch(drawings, rng, others=0.1, reach=1))
        std = torch.empty(BATCH, 1, 1, 1).uniform_(*DECODER_NOISE) / model.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = model.encode(x).latent_dist.mean.float()
            y = model.decode(z + std * torch.randn_like(z)).sample.float()
        run.step(_reconstruction(y, x))


def _decoder(model: AutoencoderKL) -> nn.Module:
    return nn.ModuleList([model.post_quant_conv, model.decoder])


def trained(work: Path) -> AutoencoderKL:
    """The averaged weights, with `scaling_factor` set so that latents have unit variance if they are cached."""
    model = create()
    load_average(model, work / "vae.safetensors")
    if (work / "decoder.safetensors").exists():
        load_average(_decoder(model), work / "decoder.safetensors")
    if (work / "latents.safetensors").exists():
        model.register_to_config(scaling_factor=float(load_file(work / "latents.safetensors")["scale"]))
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def cache_latents(drawings: Drawings, work: Path) -> Tensor:
    """Latent means (views, names, styles, colours, 4, 8, 8) with unit variance, from `work/latents.safetensors`."""
    file = work / "latents.safetensors"
    if not file.exists():
        means = encode(drawings, trained(work))
        scale = 1 / means.std()
        log.info("latents: standard deviation %.3f, per channel %s", means.std(), means.std((0, 1, 2, 3, 5, 6)))
        save_file({"means": means * scale, "scale": scale}, file)
    return load_file(file)["means"]


@torch.no_grad()
def encode(drawings: Drawings, model: AutoencoderKL, views: int = VIEWS) -> Tensor:
    """Means (views, names, styles, colours, 4, 8, 8) of the encoder for the prior's drawings, not scaled."""
    rng = np.random.default_rng(0)
    shape = (views, len(NAMES), len(STYLES), len(COLOURS), 4, 8, 8)
    means = torch.empty(shape)
    for view in range(views):
        for name, index in enumerate(drawings.known):
            rgba = np.repeat(drawings.rgba[index], len(COLOURS), axis=0)
            images = composite(shift(rgba, rng, reach=1), list(COLOURS) * len(STYLES), rng)
            means[view, name] = model.encode(pixels(images)).latent_dist.mean.view(shape[2:])
    return means
