"""A folder of pictures with their prompts, as other tools write it: metadata.jsonl, a line {file_name, prompt, ...} per picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.files.real_images import opened, read_image

__all__ = ["METADATA", "ImageFolder", "ImageFolderError", "read_image_folder"]

METADATA = "metadata.jsonl"

FORM = '{"file_name": "0.png", "prompt": "a cat", "seed": 0}'


class ImageFolderError(ValueError):
    """A folder of pictures cannot be used; the message names the file or the line, and what to do."""


@dataclass(frozen=True)
class ImageFolder:
    """Pictures of one size, in the order of their lines."""

    path: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int | None, ...]
    metadata: tuple[Mapping[str, Any], ...]
    """The other columns."""
    size: tuple[int, int]
    """Width and height."""

    @property
    def seeded(self) -> bool:
        """Whether each picture has a seed."""
        return all(seed is not None for seed in self.seeds)

    @property
    def digest(self) -> str:
        """SHA-256 of the lines and the pictures."""
        found = sha256((self.path / METADATA).read_bytes())
        for file in self.files:
            found.update(sha256((self.path / file).read_bytes()).digest())
        return found.hexdigest()

    def images(self, rows: Sequence[int]) -> Float[Tensor, "rows 3 height width"]:
        """Pictures in [0, 1], float32.

        Raises:
            ImageFolderError: one is damaged, transparent or deeper than 8 bits.
        """
        return torch.stack([_picture(self.path / self.files[row]) for row in rows])


def _picture(file: Path) -> Tensor:
    try:
        return read_image(file)
    except ValueError as error:
        raise ImageFolderError(
            f"{file} cannot be read as a picture: {error} Write it anew, or take out its line."
        ) from None


def read_image_folder(path: Path) -> ImageFolder:
    """Read the lines of a folder and the headers of its pictures.

    Raises:
        ImageFolderError: there are no lines, one is wrong, or a picture is missing, named twice, unreadable or of another size.
    """
    rows = list(_lines(path))
    files = [row["file_name"] for _, row in rows]
    first: dict[str, int] = {}
    for (number, _), file in zip(rows, files, strict=True):
        if first.setdefault(file, number) != number:
            raise ImageFolderError(
                f"{path / METADATA}: lines {first[file]} and {number} both name {file!r}. Take one out."
            )
    drawn: dict[tuple[str, int], int] = {}
    for number, row in rows:
        seed, prompt = row.get("seed"), row["prompt"]
        if seed is not None and drawn.setdefault((prompt, seed), number) != number:
            lines = f"lines {drawn[prompt, seed]} and {number}"
            raise ImageFolderError(
                f"{path / METADATA}: {lines} both have seed {seed} and prompt {prompt!r}. Take one out."
            )
    sizes = {file: _size(path, file, number) for (number, _), file in zip(rows, files, strict=True)}
    other = next((file for file in files if sizes[file] != sizes[files[0]]), None)
    if other is not None:
        (w, h), (v, g) = sizes[files[0]], sizes[other]
        raise ImageFolderError(
            f"{path}: {files[0]} is {w} x {h} pixels and {other} {v} x {g}. Rewards and features of different sizes do not "
            "compare: resize them, or evaluate one size at a time."
        )
    known = {"file_name", "prompt", "seed"}
    return ImageFolder(
        path,
        tuple(files),
        tuple(row["prompt"] for _, row in rows),
        tuple(row.get("seed") for _, row in rows),
        tuple({key: value for key, value in row.items() if key not in known} for _, row in rows),
        sizes[files[0]],
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    file = path / METADATA
    if not file.is_file():
        raise ImageFolderError(
            f"{path} has no {METADATA}, so nobody knows its prompts. Write one line per picture: {FORM}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageFolderError(f"{file} cannot be read: {error}.") from None
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise ImageFolderError(f"{file} is empty. Write one line per picture: {FORM}")
    for number, line in rows:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ImageFolderError(f"{file}, line {number} is no JSON: {error}. It looks like {FORM}") from None
        _check_row(row, f"{file}, line {number}")
        yield number, row


def _check_row(row: Any, where: str) -> None:
    for key in ("file_name", "prompt"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            held = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ImageFolderError(f"{where} has no text {key!r}, it has {held}. It looks like {FORM}")
    seed = row.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ImageFolderError(f"{where}: seed is {seed!r}; it is a whole number, or left out.")
    place = PurePosixPath(row["file_name"])
    if place.is_absolute() or ".." in place.parts or "\0" in row["file_name"]:
        raise ImageFolderError(f"{where}: file_name is {row['file_name']!r}; it lies in the folder itself.")


def _size(path: Path, file: str, number: int) -> tuple[int, int]:
    where = f"{path / METADATA}, line {number}"
    if not (path / file).is_file():
        raise ImageFolderError(f"{where}: there is no {path / file}. Put it there, or take out the line.")
    try:
        with opened(path / file) as image:
            return image.size
    except ValueError as error:
        raise ImageFolderError(
            f"{where}: {path / file} is no picture: {error} Write it anew, or take out the line."
        ) from None
