"""The denoiser of `fashion`: a small stock `UNet2DModel` on pixels, and the chain it is sampled with."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from jaxtyping import Float
from torch import Tensor

from pipelines.emoji.build.learning.training import Training, load_average

CHANNELS = (16, 32, 64, 128)  # few at full size, where a channel costs most and clothes have least to say
DOWN = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
UP = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
BATCH, RATE, DECAY = 64, 1.5e-3, 0.998
STEPS = 1000  # of the noise schedule
FLOOR = 0.1  # standard deviation of the noise in the state that the last step, which adds none, takes away
CEILING = 1e-4  # alpha_bar at t = 999
NOISY = 0.7  # t = 1000 u^0.7: a little more practice at high noise, where the class is decided


def create() -> UNet2DModel:
    """The untrained denoiser, 2.5 M parameters."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=CHANNELS,
        down_block_types=DOWN,
        up_block_types=UP,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
    )


def schedule() -> DDPMScheduler:
    """Memoryless at the start, and cut where the network has little left to add.

    alpha_bar(t) = cos(phi_t)^2 with phi linear in t, from sin(phi_0) = 0.1 to alpha_bar = 1e-4. Equal angles spread the path
    KL, (SNR_s - SNR_t)/2 |dx0|^2 summed over steps, as evenly as a chain ending at SNR 99 allows. The last step answers
    x0-hat, without noise. Clipping x0-hat is part of the transitions' means.
    """
    phi = torch.linspace(math.asin(FLOOR), math.acos(math.sqrt(CEILING)), STEPS, dtype=torch.float64)
    alpha_bar = phi.cos().square()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return DDPMScheduler(
        trained_betas=betas.tolist(), prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=True
    )


def train(images: Float[Tensor, "count 1 32 32"], work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/prior.safetensors`.

    The loss is the mean squared error of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
    """
    torch.manual_seed(0)
    model = create()
    run = Training(model, work / "prior.safetensors", minutes=minutes, lr=RATE, decay=DECAY)
    torch.manual_seed(1 + run.steps)
    alpha_bar = schedule().alphas_cumprod
    while not run.done:
        x0 = images[torch.randint(len(images), (BATCH,))]
        eps = torch.randn_like(x0)
        t = (
            (((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH) ** NOISY * STEPS).long().clamp_max(STEPS - 1)
        )  # stratified
        a, b = alpha_bar[t].sqrt()[:, None, None, None], (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            v = model(a * x0 + b * eps, t).sample
        run.step((v.float() - (a * eps - b * x0)).square().mean())


def pipeline(work: Path) -> tuple[DDPMPipeline, int]:
    """The averaged weights in a stock pipeline, single precision, and the number of training steps behind them."""
    model = create()
    steps = load_average(model, work / "prior.safetensors")
    return DDPMPipeline(unet=model.requires_grad_(False).eval(), scheduler=schedule()), steps
