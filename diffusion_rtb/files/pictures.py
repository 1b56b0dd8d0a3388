"""Pictures of samples: a labelled grid as one image, prior beside posterior, written atomically as PNG.

Samples that are vectors become dots: one panel for each row of the grid, on each side, all on the same axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.files.whole import whole

__all__ = ["grid", "panels", "save_png", "side_by_side", "to_pil", "write_images"]

MARGIN, GAP, SPLIT = 16, 6, 28
SMALLEST, LARGEST = 112, 256
PANEL, BINS = 256, 64
"""Pixels of a panel of dots, bars of a panel of numbers."""
LINES = 4
"""Of a title or a caption, at most; a longer text ends in an ellipsis."""
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 32), (110, 110, 110)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

DOT, FRAME = (0.12, 0.35, 0.65), 0.85


def to_pil(image: Float[Tensor, "*shape"]) -> Image.Image:
    """One RGB picture from values in [0, 1]; values outside are clipped."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"A sample of shape {tuple(image.shape)} is no picture (3, height, width): an analytic prior's are vectors. "
            "Look at the sheets in the run's folders samples/ and eval/, which show them as dots."
        )
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def grid(
    images: Float[Tensor, "batch *shape"],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    rows: Sequence[str] | None = None,
    headers: Sequence[str] = (),
) -> Image.Image:
    """The images in rows of `columns`, each with its caption below, each row with its title above.

    Small pictures are enlarged by a whole factor with sharp pixels, large ones are shrunk.

    Args:
        images: values in [0, 1], (batch, 3, height, width), row by row; or vectors (batch, dim), each row of them one panel.
        columns: pictures per row.
        captions: a short text under each picture; wrapped to its width and cut after a few lines. Vectors have no room for it.
        rows: a title above each row, wrapped and cut likewise.
        headers: titles of equal blocks of columns, e.g. ("prior", "posterior"); blocks are set apart.

    Raises:
        ValueError: no images, `columns` < 1, or texts that do not match the pictures.
    """
    _check(len(images), columns, captions, rows, headers)
    if images.ndim == 2:
        blocks = max(1, len(headers))
        return grid(panels(list(images.split(columns // blocks))), blocks, rows=rows, headers=headers)
    cells = [_resized(to_pil(image)) for image in images]
    layout = _Layout(cells[0].width, cells[0].height, columns, max(1, len(headers)))
    texts = [layout.wrapped(c, layout.small, layout.width) for c in captions or [""] * len(cells)]
    titles = [layout.wrapped(t, layout.large, layout.inner) for t in rows or [""] * math.ceil(len(cells) / columns)]
    tops, height = layout.rows(titles, texts, header=bool(headers))
    sheet = Image.new("RGB", (layout.inner + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for block, header in enumerate(headers):
        _text(draw, [header], (layout.left(block * columns // len(headers)), MARGIN), layout.large, INK)
    for title, top in zip(titles, tops, strict=True):
        _text(draw, title, (MARGIN, top - layout.line(layout.large) * len(title)), layout.large, INK)
    for index, cell in enumerate(cells):
        left, top = layout.left(index % columns), tops[index // columns]
        sheet.paste(cell, (left, top))
        _text(draw, texts[index], (left, top + layout.height), layout.small, FAINT)
    return sheet


def panels(groups: Sequence[Float[Tensor, "_ dim"]]) -> Float[Tensor, "groups 3 side side"]:
    """One picture of each group of vectors, all on the same axes: dots at the first two numbers, or bars where there is one."""
    everything = torch.cat(list(groups)).detach().double().cpu()[:, :2]
    low, high = everything.amin(0), everything.amax(0)
    span = (high - low).clamp_min(1e-12)
    pictures = []
    for group in groups:
        at = (group.detach().double().cpu()[:, :2] - low) / span * 0.96 + 0.02
        picture = torch.ones(3, PANEL, PANEL)
        colour = torch.tensor(DOT)[:, None]
        if at.shape[1] == 1:
            heights = torch.histc(at[:, 0], BINS, 0, 1)
            tops = (PANEL * (1 - 0.96 * heights / heights.max())).repeat_interleave(PANEL // BINS)
            picture[:, torch.arange(PANEL)[:, None] >= tops] = colour
        else:
            column, row = (at[:, 0] * (PANEL - 2)).long(), ((1 - at[:, 1]) * (PANEL - 2)).long()
            for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
                picture[:, row + down, column + right] = colour
        for edge in (picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]):
            edge.fill_(FRAME)
        pictures.append(picture)
    return torch.stack(pictures)


def side_by_side(
    prior: Float[Tensor, "prompts columns *shape"],
    posterior: Float[Tensor, "prompts same_columns *same_shape"],
    prompts: Sequence[str],
    *,
    captions: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]] | None = None,
) -> Image.Image:
    """One row per prompt: the prior's pictures left, the posterior's from the same seeds right."""
    if prior.shape != posterior.shape:
        raise ValueError(f"Both sides need equal shapes, got {tuple(prior.shape)} and {tuple(posterior.shape)}.")
    texts = None if captions is None else [t for left, right in zip(*captions, strict=True) for t in [*left, *right]]
    both = torch.cat([prior, posterior], dim=1)
    return grid(both.flatten(0, 1), both.shape[1], texts, rows=prompts, headers=("prior", "posterior"))


def save_png(image: Image.Image, path: Path | str) -> Path:
    """Write a PNG; the file appears whole or not at all. Its folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        image.save(unfinished, format="PNG", optimize=True)
    return path


@dataclass(frozen=True)
class _Layout:
    """Where pictures and text go on the sheet; pixels."""

    width: int
    height: int
    columns: int
    blocks: int

    @property
    def small(self) -> Font:
        return ImageFont.load_default(12)

    @property
    def large(self) -> Font:
        return ImageFont.load_default(16)

    @property
    def inner(self) -> int:
        return self.left(self.columns - 1) + self.width - MARGIN

    def left(self, column: int) -> int:
        split = (SPLIT - GAP) * (column * self.blocks // self.columns)
        return MARGIN + column * (self.width + GAP) + split

    def rows(
        self, titles: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], *, header: bool
    ) -> tuple[list[int], int]:
        """Top of the pictures of each row, below its title, and the height of the sheet."""
        y = MARGIN + (self.line(self.large) + GAP if header else 0)
        tops = []
        for row, title in enumerate(titles):
            tops.append(y + self.line(self.large) * len(title))
            lines = max(len(text) for text in texts[row * self.columns : (row + 1) * self.columns])
            y = tops[-1] + self.height + self.line(self.small) * lines + 2 * GAP
        return tops, y - 2 * GAP + MARGIN

    @staticmethod
    def line(font: Font) -> int:
        return int(font.getbbox("Ŭg|")[3]) + 3

    @staticmethod
    def wrapped(text: str, font: Font, width: int) -> list[str]:
        """The text in at most `LINES` lines no wider than `width`, broken between words, inside a word only where it must."""
        lines: list[str] = []
        for word in map(plain, text.split()):
            if lines and _fitting(joined := f"{lines[-1]} {word}", font, width) == len(joined):
                lines[-1] = joined
                continue
            while word and len(lines) <= LINES:
                fits = max(1, _fitting(word, font, width))
                lines.append(word[:fits])
                word = word[fits:]
            if len(lines) > LINES:
                break
        if len(lines) <= LINES:
            return lines
        last = lines[LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        return [*lines[: LINES - 1], f"{last}…"]


def _fitting(text: str, font: Font, width: int) -> int:
    """How many of its first letters are no wider than `width`; the work grows with that number, not with the text."""
    fits, beyond = 0, 1
    while beyond <= len(text) and font.getlength(text[:beyond]) <= width:
        fits, beyond = beyond, 2 * beyond
    beyond = min(beyond, len(text) + 1)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if font.getlength(text[:middle]) <= width else (fits, middle)
    return fits


def _text(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    at: tuple[int, int],
    font: Font,
    colour: tuple[int, int, int],
) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _Layout.line(font)), line, fill=colour, font=font)


def _resized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest > LARGEST:
        size = tuple(max(1, round(side * LARGEST / longest)) for side in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = max(1, math.ceil(SMALLEST / longest))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _check(
    count: int, columns: int, captions: Sequence[str] | None, rows: Sequence[str] | None, headers: Sequence[str]
) -> None:
    if count == 0:
        raise ValueError("A grid needs at least one image, got none.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    if captions is not None and len(captions) != count:
        raise ValueError(f"A grid of {count} images needs as many captions, got {len(captions)}.")
    if rows is not None and len(rows) != math.ceil(count / columns):
        raise ValueError(
            f"{count} images in {columns} columns need {math.ceil(count / columns)} row titles, got {len(rows)}."
        )
    if headers and columns % len(headers):
        raise ValueError(f"{columns} columns cannot be split into {len(headers)} equal blocks.")


def write_images(batches: Iterable[Float[Tensor, "_ *shape"]], paths: Sequence[Path]) -> None:
    """Save images one by one as they come, each to its path."""
    images = (image for batch in batches for image in batch)
    for image, path in zip(images, paths, strict=True):
        save_png(to_pil(image), path)
