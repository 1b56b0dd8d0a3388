"""Pictures of a prior or a posterior, one file each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.grids import save_png, to_pil
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.rollout import rollout
from diffusion_rtb.seeds import seed_of

__all__ = ["draw_images", "write_images"]


def draw_images(
    prior: Prior, prompts: Sequence[str], count: int, *, seed: int = 0, batch: int = 8
) -> Float[Tensor, "images *shape"]:
    """`count` images per prompt, those of one prompt adjacent, in [0, 1].

    The noise of an image depends on `seed`, its prompt and its number only: not on the other prompts or the batch,
    and it is the same for prior and posterior.

    Args:
        prior: Samples the network as it is now: the posterior, or the prior inside `with prior.as_prior()`.
        prompts: At least one.
        count: Images per prompt.
        seed: Of the noise.
        batch: Images drawn at once.

    Raises:
        ValueError: there are no prompts, or `count` or `batch` is below 1.
    """
    if not prompts or count < 1 or batch < 1:
        raise ValueError(
            f"Sampling needs a prompt, count >= 1 and batch >= 1; got {len(prompts)}, {count} and {batch}."
        )
    texts = [prompt for prompt in prompts for _ in range(count)]
    seeds = [seed_of(seed, "sample", prompt, number) for prompt in prompts for number in range(count)]
    parts = []
    for start in range(0, len(texts), batch):
        chunk = slice(start, start + batch)
        parts.append(prior.decode(rollout(prior, texts[chunk], seeds[chunk]).x_0))
    return torch.cat(parts)


def write_images(
    images: Float[Tensor, "images *shape"], prompts: Sequence[str], count: int, folder: Path | str
) -> list[Path]:
    """Save what `draw_images` drew as FOLDER/000-a-cat-emoji-0.png and return the paths."""
    paths = [
        Path(folder, f"{row:03d}-{_slug(prompt)}-{number}.png")
        for row, prompt in enumerate(prompts)
        for number in range(count)
    ]
    return [save_png(to_pil(image), path) for image, path in zip(images, paths, strict=True)]


def _slug(prompt: str, limit: int = 40) -> str:
    """The prompt as part of a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:limit].strip("-") or "empty"
