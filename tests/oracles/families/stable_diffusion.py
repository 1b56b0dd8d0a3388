"""Stable Diffusion 1.x: text to 64 x 64 pixels through (4, 8, 8) latents."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from tests.oracles.tiny import tiny_stable_diffusion


def build() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()
