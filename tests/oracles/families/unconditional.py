"""A pixel model without conditioning in the layout of google/ddpm-cifar10-32."""

from __future__ import annotations

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from tests.oracles.tiny import tiny_unconditional_unet

PROMPTS = ("",)


def build() -> DDPMPipeline:
    torch.manual_seed(0)
    return DDPMPipeline(unet=tiny_unconditional_unet(), scheduler=DDPMScheduler())
