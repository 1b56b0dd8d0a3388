"""The vectors between which an evaluation measures distances: what the embedder makes of images, checked sample by sample."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.abilities import Embedder
from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.files.real_images import image_files, read_images

__all__ = ["Reference", "check_embedder", "features_of", "features_of_files", "real_images"]


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of the real images in a folder, to hold the samples of all prompts together against."""

    features: Float[Tensor, "images dim"]
    prompts: int
    """How many are evaluated."""

    def covers(self, prompt: Int[Tensor, " batch"]) -> bool:
        """Whether samples of these prompts are to be held against it: those of a single one among several are not."""
        return len(prompt.unique()) == self.prompts


def check_embedder(embedder: Any, key: str = "eval.embedder") -> None:
    """Raise ValueError unless what the config names as `key` has a method embed(images), or is itself called with images alone."""
    if isinstance(embedder, Embedder):
        return
    try:
        inspect.signature(embedder).bind("images")
    except (TypeError, ValueError):
        raise ValueError(
            f"{key} {_name(embedder)} has no method embed(images) and is no function of images alone; take `clip_score` or "
            "`features`, or null for no distances between images."
        ) from None


@torch.no_grad()
def features_of(
    embedder: Any, images: Float[Tensor, "batch *shape"], names: Sequence[str], key: str = "eval.embedder"
) -> Float[Tensor, "batch dim"]:
    """One vector for each image, float32, on the CPU.

    Args:
        embedder: See `check_embedder`.
        images: As the reward sees them.
        names: What an error calls each of them.
        key: Where the config names the embedder.

    Raises:
        ValueError: not one vector per image, or one of them is not finite.
    """
    found = embedder.embed(images) if isinstance(embedder, Embedder) else embedder(images)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images) or found.shape[1] == 0:
        form = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{key} {_name(embedder)} answered {form} for {len(images)} images; it must be one vector each, a tensor "
            f"({len(images)}, dim)."
        )
    features = found.float().cpu()
    broken = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{key} {_name(embedder)} gave NaN or infinite features for {names[broken[0]]}"
            f"{f' and {len(broken) - 1} more of {len(images)}' if len(broken) > 1 else ''}. Look at that image; half precision can "
            "overflow (`dtype: float32`)."
        )
    return features


def real_images(config: EvalConfig) -> list[Path]:
    """The files in the folder that `eval.reference` names, see `image_files`; none where it names none."""
    return [] if config.reference is None else image_files(config.reference)


def features_of_files(
    embedder: Any, paths: Sequence[Path], batch: int, device: torch.device
) -> Float[Tensor, "images dim"]:
    """One vector for each image of a folder; see `features_of`."""
    return torch.cat(
        [
            features_of(embedder, images.to(device), [str(path) for path in chunk])
            for chunk, images in read_images(paths, batch)
        ]
    )


def _name(embedder: Any) -> str:
    return getattr(embedder, "__name__", type(embedder).__name__)
