"""The denoiser and the text encoder of the `emoji` prior, trained together on cached latents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines.emoji.build.captions import CONTEXT, Captions, token_ids
from pipelines.emoji.build.learning.training import Training, load_average

CHANNELS = (96, 128)
WIDTH = 64  # of the text encoder
BATCH, RATE = 64, 1.2e-3
STEPS = 1000  # of the noise schedule
FLOOR = 0.1  # standard deviation of the noise that remains at t = 0
CEILING = 1e-4  # alpha_bar at t = 999
NOISY = 0.7  # t = 1000 u^0.7: a little more practice at high noise, where the caption decides what is drawn


def schedule() -> DDIMScheduler:
    """Memoryless at the start and with a noise floor at the end.

    alpha_bar(t) = cos(phi_t)^2 with phi linear in t, from sin(phi_0) = 0.1 to alpha_bar = 1e-4. Equal angles spread the path
    KL, (SNR_s - SNR_t)/2 |dx0|^2 summed over steps, as evenly as a chain ending at SNR 99 allows; with the usual end
    at SNR 1e3 and more the last step alone decides it.
    """
    phi = torch.linspace(math.asin(FLOOR), math.acos(math.sqrt(CEILING)), STEPS, dtype=torch.float64)
    alpha_bar = phi.cos().square()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return DDIMScheduler(
        trained_betas=betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        steps_offset=1,  # without effect when trailing, but the pipeline insists on it
        clip_sample=False,
    )


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that one optimiser trains and one checkpoint holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # diffusers' name for the number of heads
            norm_num_groups=16,
        )
        self.text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT,
                bos_token_id=49406,
                eos_token_id=49407,
                pad_token_id=49407,
            )
        )

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity for latents (batch, 4, 8, 8) at t (batch,) given token ids (batch, 24)."""
        return self.unet(x, t, self.text(ids)[0]).sample


def train(latents: Tensor, work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/unet.safetensors`.

    `latents` are means (views, names, styles, colours, 4, 8, 8) of unit variance. The loss is the mean squared error of
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
    """
    torch.manual_seed(0)
    model = Denoiser().to(memory_format=torch.channels_last)
    run = Training(model, work / "unet.safetensors", minutes=minutes, lr=RATE, decay=0.999)
    torch.manual_seed(1 + run.steps)
    alpha_bar, captions, sizes = schedule().alphas_cumprod, Captions(), np.array(latents.shape[:4])
    ids = token_ids(captions.texts)
    while not run.done:
        view, name, style, colour = (torch.randint(size, (BATCH,)) for size in sizes.tolist())
        t = (((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH) ** NOISY * STEPS).long()  # stratified
        x0, eps = latents[view, name, style, colour], torch.randn(BATCH, 4, 8, 8)
        a, b = alpha_bar[t].sqrt()[:, None, None, None], (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        x = (a * x0 + b * eps).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            v = model(x, t, ids[captions.draw(name, style, colour)])
        run.step((v.float() - (a * eps - b * x0)).square().mean())


def trained(work: Path) -> tuple[Denoiser, int]:
    """The averaged weights and the number of training steps behind them."""
    model = Denoiser()
    steps = load_average(model, work / "unet.safetensors")
    return model.requires_grad_(False).eval(), steps
