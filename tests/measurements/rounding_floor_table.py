"""The rounding floor of the bundled prior by dtype, guidance, steps and size: the table of docs/precision.md.

python -m tests.measurements.rounding_floor_table
"""

from __future__ import annotations

import logging
import sys
from itertools import product
from typing import Literal

import torch

from diffusion_rtb.chain.rollout import rollout
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.rounding_floor import rounding_floor
from pipelines.stable_diffusion import StableDiffusion

PROMPTS = ["a cat emoji", "a rocket emoji", "a pizza emoji", "a red heart emoji"]
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
ROWS = [(64, 10), (64, 20), (64, 50), (128, 10)]
"""Pixels of a side, and steps of DDIM with eta 1."""


def measured(dtype: Dtype, guidance: float, pixels: int, steps: int) -> tuple[float, int]:
    """The floor, nats, on a trajectory of each prompt, and the number of latent dimensions."""
    prior = StableDiffusion(
        "emoji",
        steps=steps,
        guidance=guidance,
        tilted_prior="guided" if guidance > 1 else "unguided",
        height=pixels,
        width=pixels,
        dtype=dtype,
        device="cpu",
    )
    prior.attach(seed=0)
    sampler = Sampler(prior, lambda images, prompts: torch.zeros(len(images)), PROMPTS, len(PROMPTS))
    trajectory = rollout(prior, PROMPTS, range(len(PROMPTS)))
    own = Batch(trajectory, torch.arange(len(PROMPTS)), torch.zeros(len(PROMPTS)))
    return rounding_floor(sampler, own), int(torch.Size(prior.dims).numel())


def main() -> None:
    """Write the table as Markdown."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # float16 on a CPU is what is asked for
    sys.stdout.write(f"| dimensions | steps | guidance | {' | '.join(DTYPES)} |\n|---|---|---|---|---|---|\n")
    for (pixels, steps), guidance in product(ROWS, (1.0, 5.0)):
        found = [measured(dtype, guidance, pixels, steps) for dtype in DTYPES]
        numbers = " | ".join(f"{floor:.2g}" for floor, _ in found)
        sys.stdout.write(f"| {found[0][1]} | {steps} | {guidance:g} | {numbers} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
