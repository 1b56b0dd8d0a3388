"""Samples to check a reward on: pictures made here, a folder of one's own, draws of a prior, or vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

__all__ = ["Samples", "choose_samples", "drawn_samples", "folder_samples", "standard_samples", "vector_samples"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

COLOURS = ("crimson", "royalblue", "seagreen", "gold", "black", "white", "hotpink", "saddlebrown")
WORDS = ("OPEN", "Coffee", "STOP", "exit 7", "Hello", "SALE", "Taxi", "2026")


@dataclass(frozen=True, eq=False)
class Samples:
    """What a reward is asked about."""

    images: Float[Tensor, "batch *dims"]
    """Pictures (batch, 3, height, width) in [0, 1], or vectors (batch, dim); float32."""
    prompts: list[str]
    """One per sample."""
    source: str
    """Where they are from, in words."""

    def __len__(self) -> int:
        return len(self.images)

    def with_prompts(self, prompts: Sequence[str]) -> Samples:
        """The same samples with these prompts, in turn; as they are if there are none."""
        if not prompts:
            return self
        return replace(self, prompts=[prompts[i % len(prompts)] for i in range(len(self))])


def choose_samples(
    *,
    images: Path | None = None,
    prior: Path | None = None,
    dim: int | None = None,
    prompts: Sequence[str] = (),
    count: int = 32,
    side: int | None = None,
) -> Samples:
    """The samples that the options of `diffusion-rtb check-reward` ask for.

    Args:
        images: A folder of pictures; see `folder_samples`.
        prior: A config or run whose prior is drawn from; see `drawn_samples`.
        dim: Vectors of so many dimensions; see `vector_samples`.
        prompts: Instead of the samples' own, in turn.
        count: How many samples.
        side: Pixels of square pictures, from a folder or made here (256 by default).

    Raises:
        ValueError: more than one source, `side` for samples that have their own size, or what the sources refuse.
    """
    given = [f"--{name}" for name, value in (("images", images), ("prior", prior), ("dim", dim)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say where samples are from: give one of them.")
    if side is not None and (prior is not None or dim is not None):
        raise ValueError(f"--size is {side}, but {given[0]} decides the size of its samples: leave it out.")
    if prior is not None:
        return drawn_samples(prior, prompts, count)
    if dim is not None:
        found = vector_samples(dim, count)
    elif images is not None:
        found = folder_samples(images, side, count)
    else:
        found = standard_samples(count, side or 256)
    return found.with_prompts(prompts)


def standard_samples(count: int = 32, side: int = 256) -> Samples:
    """Square pictures in turn of eight kinds, each with a fitting prompt; the same at every call.

    Crops of a portrait photo (Grace Hopper, of matplotlib's sample data; left out where that is not installed), shapes, words,
    soft and fine noise, gradients, stripes and plain colours, all with 8-bit levels.

    Raises:
        ValueError: fewer than 2 pictures, or `side` below 16 pixels.
    """
    if count < 2 or side < 16:
        raise ValueError(f"Checking needs at least 2 pictures of at least 16 pixels; got {count} of {side}.")
    kinds: list[Callable[[int, int], tuple[Image.Image, str]]]
    kinds = [_shape, _sign, _soft_noise, _fine_noise, _gradient, _stripes, _plain]
    photo = _photo()
    if photo is not None:
        kinds.insert(0, lambda number, side: _crop(photo, number, side))
    pairs = [kinds[i % len(kinds)](i // len(kinds), side) for i in range(count)]
    what = "photo crops, " if photo is not None else ""
    source = f"{count} pictures of {side} pixels: {what}shapes, words, noise, gradients, stripes, plain colours"
    return Samples(torch.stack([_tensor(picture) for picture, _ in pairs]), [text for _, text in pairs], source)


def folder_samples(folder: Path | str, side: int | None = None, limit: int | None = None) -> Samples:
    """The pictures of a folder with their prompts.

    A picture's prompt is its line `{"file_name": ..., "text": ...}` in metadata.jsonl, else the text file of its name beside it,
    else its name.

    Args:
        folder: With .png, .jpg, .webp or .bmp files.
        side: Cut from the centre and resize to squares of so many pixels; None: they all have one size already.
        limit: The first so many, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two pictures, one that cannot be read, or pictures of different sizes without `side`.
    """
    folder = Path(folder)
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
    texts = _metadata(folder / "metadata.jsonl")
    prompts = [texts.get(path.name) or _prompt_beside(path) for path in paths]
    images = torch.stack([_tensor(picture) for picture in pictures])
    return Samples(images, prompts, f"{len(paths)} pictures of {folder}, {images.shape[3]} x {images.shape[2]} pixels")


def drawn_samples(config: Path | str, prompts: Sequence[str], count: int, seed: int = 0) -> Samples:
    """About `count` draws of the prior of a config or run, for its own prompts or for `prompts`.

    Raises:
        ValueError: see `load_prior`.
    """
    from diffusion_rtb.assemble import load_prior
    from diffusion_rtb.sampling import draw_images

    run, prior = load_prior(Path(config))
    texts = list(dict.fromkeys(prompts)) if prompts else list(run.prompts.texts())[:count]
    each = max(1, math.ceil(count / len(texts)))
    images = draw_images(prior, texts, each, seed=seed, batch=run.eval.batch).float().cpu()
    repeated = [text for text in texts for _ in range(each)]
    return Samples(images, repeated, f"{len(images)} draws of the prior of {config}")


def vector_samples(dim: int, count: int = 32, scale: float = 3.0) -> Samples:
    """Normal vectors with mean 0 and standard deviation `scale`, for rewards of vectors such as `density`.

    Raises:
        ValueError: `dim` below 1, or fewer than 2 vectors.
    """
    if dim < 1 or count < 2:
        raise ValueError(f"Checking needs at least 2 vectors of at least 1 dimension; got {count} of {dim}.")
    x = scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    return Samples(x, [""] * count, f"{count} vectors of {dim} dimensions, normal with standard deviation {scale:g}")


# Pictures


def _photo() -> Image.Image | None:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    return _opened(path) if path.is_file() else None


def _crop(photo: Image.Image, number: int, side: int) -> tuple[Image.Image, str]:
    """The whole width first, then ever closer looks at other places."""
    part = round(photo.width * (1, 0.7, 0.5, 0.35)[number % 4])
    rng = np.random.default_rng(number)
    left, top = (int(rng.integers(length - part + 1)) for length in photo.size)
    cut = photo.crop((left, top, left + part, top + part))
    return cut.resize((side, side), Image.Resampling.BICUBIC), "a portrait of a woman in uniform"


def _shape(number: int, side: int) -> tuple[Image.Image, str]:
    ink, paper = COLOURS[number % 4], COLOURS[5 - number // 4 % 2]
    kind = ("circle", "square", "triangle")[number % 3]
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    low, high, middle = side * 0.2, side * 0.8, side / 2
    if kind == "circle":
        draw.ellipse((low, low, high, high), fill=ink)
    elif kind == "square":
        draw.rectangle((low, low, high, high), fill=ink)
    else:
        draw.polygon([(middle, low), (low, high), (high, high)], fill=ink)
    return picture, f"a {ink} {kind} on a {paper} background"


def _sign(number: int, side: int) -> tuple[Image.Image, str]:
    word = WORDS[number % len(WORDS)]
    ink, paper = (("black", "white"), ("white", "crimson"), ("gold", "midnightblue"))[number % 3]
    picture = Image.new("RGB", (side, side), paper)
    font = ImageFont.load_default(size=1.4 * side / len(word))
    ImageDraw.Draw(picture).text((side / 2, side / 2), word, ink, font, anchor="mm")
    return picture, f'a {paper} sign that says "{word}"'


def _soft_noise(number: int, side: int) -> tuple[Image.Image, str]:
    coarse = np.random.default_rng(number).integers(0, 256, (3 + number, 3 + number, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), "a soft blur of colours"


def _fine_noise(number: int, side: int) -> tuple[Image.Image, str]:
    spread = (20, 60, 120, 255)[number % 4]
    noise = np.random.default_rng(number).integers(128 - spread // 2, 128 + (spread + 1) // 2, (side, side, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8)), "grey noise on a screen"


def _gradient(number: int, side: int) -> tuple[Image.Image, str]:
    ends = [COLOURS[number % 8], COLOURS[(number + 3) % 8]]
    colours = np.array([Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in ends], dtype=float)
    share = np.linspace(0, 1, side)[:, None, None]
    ramp = np.broadcast_to(colours[0] * (1 - share) + colours[1] * share, (side, side, 3)).round().astype(np.uint8)
    return Image.fromarray(ramp), f"a gradient from {ends[0]} to {ends[1]}"


def _stripes(number: int, side: int) -> tuple[Image.Image, str]:
    ink, paper = COLOURS[number % 4], COLOURS[4 + number % 4]
    picture = Image.new("RGB", (side, side), paper)
    draw, width = ImageDraw.Draw(picture), max(1, side >> (2 + number % 4))
    for start in range(0, side, 2 * width):
        draw.rectangle((start, 0, start + width - 1, side), fill=ink)
    return picture, f"{ink} and {paper} stripes"


def _plain(number: int, side: int) -> tuple[Image.Image, str]:
    colour = COLOURS[(3 * number + 4) % 8]
    return Image.new("RGB", (side, side), colour), f"a plain {colour} surface"


# Files


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


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    texts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                texts[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: write {{"file_name": "a.png", "text": "a cat"}} ({error!r}).'
            ) from error
    return texts


def _prompt_beside(path: Path) -> str:
    note = path.with_suffix(".txt")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return path.stem.replace("_", " ").replace("-", " ")


def _tensor(picture: Image.Image) -> Float[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
