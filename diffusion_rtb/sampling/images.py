"""Pictures of a prior or a posterior, one file each, however many prompts there are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["draw_batches", "draw_images", "image_paths", "slug"]


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
    return torch.cat(list(draw_batches(prior, prompts, count, seed=seed, batch=batch)))


def draw_batches(
    prior: Prior, prompts: Sequence[str], count: int, *, seed: int = 0, batch: int = 8
) -> Iterator[Float[Tensor, "_ *shape"]]:
    """The same, `batch` images at a time, so that no number of prompts fills the memory."""
    pairs = numbered(range(len(prompts)), count)
    seeds = [seed_of(seed, "sample", prompts[row], number) for row, number in pairs]
    for drawn in Sampler(prior, _none, prompts, batch).stream([row for row, _ in pairs], seeds):
        assert drawn.images is not None
        yield drawn.images


def _none(images: Float[Tensor, "batch *shape"], prompts: Sequence[str]) -> Float[Tensor, " batch"]:
    return torch.zeros(len(images), device=images.device)


def image_paths(prompts: Sequence[str], count: int, folder: Path | str, *, overwrite: bool = False) -> list[Path]:
    """Where the images of `draw_images` go, in its order: FOLDER/000-a-cat-emoji-0.png.

    Raises:
        ValueError: one is there already, and may not be overwritten.
    """
    paths = [
        Path(folder, f"{row:03d}-{slug(prompt)}-{number}.png")
        for row, prompt in enumerate(prompts)
        for number in range(count)
    ]
    there = [] if overwrite else [path for path in paths if path.exists()]
    if there:
        raise ValueError(
            f"{there[0]} is there already ({len(there)} of {len(paths)} files): name another folder by --out, or say --overwrite."
        )
    return paths


def slug(prompt: str, limit: int = 40) -> str:
    """The prompt as part of a file name on any system: letters and digits of any script; a hash where there are none."""
    text = unicodedata.normalize("NFC", prompt).lower()
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else "-" for c in text)
    return re.sub("-+", "-", kept)[:limit].strip("-") or sha256(prompt.encode()).hexdigest()[:12]
