"""Samples to check a reward on: pictures made here, a folder of one's own, draws of a prior, or vectors."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffusion_rtb.config.prompt_files import decoded
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.reward_check.pictures import standard_pictures, word_pictures
from diffusion_rtb.scoring.prompts import check_component_prompts

__all__ = [
    "Samples",
    "choose_samples",
    "drawn_samples",
    "folder_samples",
    "standard_samples",
    "vector_samples",
    "word_samples",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Samples:
    """What a reward is asked about."""

    images: Float[Tensor, "batch *dims"]
    """Pictures (batch, 3, height, width) in [0, 1], or vectors (batch, dim); float32."""
    prompts: list[str]
    """One per sample."""
    source: str
    """Where they are from, in words."""
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    """What is known of a prompt besides, for rewards that take metadata."""

    def __len__(self) -> int:
        return len(self.images)

    def with_prompts(self, prompts: Sequence[str], known: Mapping[str, Metadata] | None = None) -> Samples:
        """The same samples with these prompts, in turn, and what is known of them; as they are if there are none."""
        if not prompts:
            return self
        return replace(self, prompts=[prompts[i % len(prompts)] for i in range(len(self))], metadata=known or {})


def choose_samples(
    *,
    images: Path | None = None,
    prior: Path | None = None,
    dim: int | None = None,
    prompts: Sequence[str] = (),
    count: int = 32,
    side: int | None = None,
    rewards: Sequence[Mapping[str, Any]] = (),
    known: Mapping[str, Metadata] | None = None,
) -> Samples:
    """The samples that the options of `diffusion-rtb check-reward` ask for.

    Args:
        images: A folder of pictures; see `folder_samples`.
        prior: A config or run whose prior is drawn from; see `drawn_samples`.
        dim: Vectors of so many dimensions; see `vector_samples`.
        prompts: Instead of the samples' own, in turn.
        count: How many samples.
        side: Pixels of square pictures, from a folder or made here (256 by default).
        rewards: Components that will be asked: where one wants quotations in its prompts, pictures of words are made.
        known: The metadata of `prompts`.

    Raises:
        ValueError: more than one source, `side` for samples that have their own size, or what the sources refuse.
    """
    given = [f"--{name}" for name, value in (("images", images), ("prior", prior), ("dim", dim)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say where samples are from: give one of them.")
    if side is not None and (prior is not None or dim is not None):
        raise ValueError(f"--size is {side}, but {given[0]} decides the size of its samples: leave it out.")
    if prior is not None:
        drawn = drawn_samples(prior, prompts, count)
        return drawn if known is None else replace(drawn, metadata=known)
    if dim is not None:
        found = vector_samples(dim, count)
    elif images is not None:
        found = folder_samples(images, side, count)
    else:
        found = standard_samples(count, side or 256)
        if not prompts and not _taken(rewards, found):
            words = word_samples(count, side or 256)
            found = words if _taken(rewards, words) else found
    return found.with_prompts(prompts, known)


def _taken(rewards: Sequence[Mapping[str, Any]], samples: Samples) -> bool:
    """Whether every reward takes the samples' prompts, as far as rewards say so before they are built."""
    texts = list(dict.fromkeys(samples.prompts))
    try:
        for component in rewards:
            check_component_prompts(component, texts, [{}] * len(texts))
    except ValueError:
        return False
    return True


def standard_samples(count: int = 32, side: int = 256) -> Samples:
    """Square pictures in turn of shapes, words and noise, each with a fitting prompt, 8-bit; the same at every call.

    Raises:
        ValueError: fewer than 2 pictures, or `side` below 16 pixels.
    """
    _check_sizes(count, side)
    return _of_pictures(standard_pictures(count, side), f"{count} pictures of {side} pixels: shapes, words, noise")


def word_samples(count: int = 32, side: int = 256) -> Samples:
    """Square pictures of words whose prompts quote a word, for rewards that read; not every picture shows its prompt's.

    Raises:
        ValueError: fewer than 2 pictures, or `side` below 16 pixels.
    """
    _check_sizes(count, side)
    source = f"{count} pictures of {side} pixels: words that prompts quote, whole, without their ends, and backwards"
    return _of_pictures(word_pictures(count, side), source)


def _check_sizes(count: int, side: int) -> None:
    if count < 2 or side < 16:
        raise ValueError(f"Checking needs at least 2 pictures of at least 16 pixels; got {count} of {side}.")


def _of_pictures(pairs: Sequence[tuple[Image.Image, str]], source: str) -> Samples:
    return Samples(torch.stack([_tensor(picture) for picture, _ in pairs]), [text for _, text in pairs], source)


def folder_samples(folder: Path | str, side: int | None = None, limit: int | None = None) -> Samples:
    """The pictures of a folder with their prompts.

    A picture's prompt is its line `{"file_name": ..., "text": ...}` in metadata.jsonl, else the text file of its name beside it,
    else its name. What else a line holds is the prompt's metadata.

    Args:
        folder: With .png, .jpg, .webp or .bmp files.
        side: Cut from the centre and resize to squares of so many pixels; None: they all have one size already.
        limit: The first so many, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two pictures, one that cannot be read, or pictures of different sizes without `side`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
    if len(paths) < 2:
        raise ValueError(
            f"{folder} has {len(paths)} pictures ({', '.join(SUFFIXES)}); checking a reward needs at least 2."
        )
    pictures = [_opened(path) for path in paths]
    if side is not None:
        pictures = [_squared(picture, side) for picture in pictures]
    sizes = {picture.size: path.name for picture, path in zip(pictures, paths, strict=True)}
    if len(sizes) > 1:
        shown = ", ".join(f"{name} {width} x {height}" for (width, height), name in list(sizes.items())[:3])
        raise ValueError(
            f"The pictures in {folder} have {len(sizes)} sizes ({shown}, ...): give --size to make them squares."
        )
    lines = _lines(folder / "metadata.jsonl")
    rows = [lines.get(path.name) or (_prompt_beside(path), {}) for path in paths]
    rows = [(text or _prompt_beside(path), metadata) for (text, metadata), path in zip(rows, paths, strict=True)]
    images = torch.stack([_tensor(picture) for picture in pictures])
    source = f"{len(paths)} pictures of {folder}, {images.shape[3]} x {images.shape[2]} pixels"
    return Samples(images, [text for text, _ in rows], source, _by_prompt(rows, folder / "metadata.jsonl"))


def drawn_samples(config: Path | str, prompts: Sequence[str], count: int, seed: int = 0) -> Samples:
    """About `count` draws of the prior of a config or run, for its own prompts or for `prompts`.

    Raises:
        ValueError: see `load_prior`.
    """
    from diffusion_rtb.run.posterior import load_prior
    from diffusion_rtb.sampling.images import draw_images

    run, prior = load_prior(Path(config))
    texts = list(dict.fromkeys(prompts)) if prompts else list(run.prompts.texts())[:count]
    each = max(1, math.ceil(count / len(texts)))
    images = draw_images(prior, texts, each, seed=seed, batch=run.eval.batch).float().cpu()
    repeated = [text for text in texts for _ in range(each)]
    table = run.prompts.table()
    known = {text: row for text, row in zip(table.texts, table.metadata, strict=True) if text in texts}
    return Samples(images, repeated, f"{len(images)} draws of the prior of {config}", known)


def vector_samples(dim: int, count: int = 32, scale: float = 3.0) -> Samples:
    """Normal vectors with mean 0 and standard deviation `scale`, for rewards of vectors such as `density`.

    Raises:
        ValueError: `dim` below 1, or fewer than 2 vectors.
    """
    if dim < 1 or count < 2:
        raise ValueError(f"Checking needs at least 2 vectors of at least 1 dimension; got {count} of {dim}.")
    x = scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    return Samples(x, [""] * count, f"{count} vectors of {dim} dimensions, normal with standard deviation {scale:g}")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); take it out of the folder.") from error


def _squared(picture: Image.Image, side: int) -> Image.Image:
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def _lines(path: Path) -> dict[str, tuple[str, Metadata]]:
    """Prompt and metadata by file name."""
    found: dict[str, tuple[str, Metadata]] = {}
    text = decoded(path) if path.is_file() else ""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                rest = {key: value for key, value in entry.items() if key not in ("file_name", "text")}
                found[str(entry["file_name"])] = str(entry["text"]), rest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: write {{"file_name": "a.png", "text": "a cat"}} ({error!r}).'
            ) from error
    return found


def _by_prompt(rows: Iterable[tuple[str, Metadata]], where: Path) -> dict[str, Metadata]:
    found: dict[str, Metadata] = {}
    for text, metadata in rows:
        if found.setdefault(text, metadata) != metadata:
            raise ValueError(f"{where} gives the prompt {text!r} different metadata: one prompt has one.")
    return found


def _prompt_beside(path: Path) -> str:
    note = path.with_suffix(".txt")
    if note.is_file():
        return decoded(note).strip()
    return path.stem.replace("_", " ").replace("-", " ")


def _tensor(picture: Image.Image) -> Float[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
