"""Images in a folder as tensors: all of one size and read as they are, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

__all__ = ["image_files", "opened", "read_image", "read_images", "several_sizes"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""What Pillow turns into 8-bit RGB without changing its levels."""

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, or damaged ones."""


def image_files(folder: Path | str) -> list[Path]:
    """The images in a folder and those below it, by name; only their headers are read.

    Raises:
        ValueError: there is no such folder or no image in it, one is no image, or they are of several sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one with images ({', '.join(SUFFIXES)}).")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} has no images: none of its files ends in {', '.join(SUFFIXES)}.")
    if sizes := several_sizes(found):
        raise ValueError(
            f"The images of {folder} are of {sizes}: resize or crop them to one, in the way that you mean."
        )
    return found


def several_sizes(paths: Iterable[Path]) -> str:
    """Which sizes these images have, with an example of each, by their headers; empty if they are all of one."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in paths:
        with opened(path) as image:
            sizes.setdefault(image.size, path)
    shown = ", ".join(f"{path.name} {width} x {height}" for (width, height), path in list(sizes.items())[:4])
    return f"{len(sizes)} sizes ({shown})" if len(sizes) > 1 else ""


def read_image(path: Path) -> Float[Tensor, "3 height width"]:
    """An image in [0, 1].

    Raises:
        ValueError: it is damaged, has transparent parts, or more than 8 bits per channel.
    """
    with opened(path) as image:
        if image.mode not in MODES:
            raise ValueError(
                f"{path} is an image of mode {image.mode}; read are 8-bit grey and RGB images. Convert it."
            )
        try:
            whole = image.convert("RGBA")
        except UNREADABLE as error:
            raise ValueError(f"{path} is damaged ({error}); fetch or make it again.") from error
    levels = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    if int(levels[3].min()) < 255:
        raise ValueError(
            f"{path} has transparent parts, which look different on every background: put it on the one you mean."
        )
    return levels[:3].float() / 255


def read_images(
    paths: Sequence[Path], batch: int
) -> Iterator[tuple[Sequence[Path], Float[Tensor, "batch 3 height width"]]]:
    """Files and their images, so many at a time."""
    for start in range(0, len(paths), batch):
        chunk = paths[start : start + batch]
        yield chunk, torch.stack([read_image(path) for path in chunk])


def opened(path: Path) -> Image.Image:
    """A file whose header is read.

    Raises:
        ValueError: it is no image.
    """
    try:
        return Image.open(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error
