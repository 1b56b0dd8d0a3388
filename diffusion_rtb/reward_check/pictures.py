"""Pictures made to check rewards on, each with a fitting prompt; the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["standard_pictures", "word_pictures"]

COLOURS = ("crimson", "royalblue", "seagreen", "gold", "black", "white", "hotpink", "saddlebrown")
WORDS = ("OPEN", "Coffee", "STOP", "exit 7", "Hello", "SALE", "Taxi", "2026")

Drawn = tuple[Image.Image, str]
"""A picture and its prompt."""


def standard_pictures(count: int, side: int, photo: Image.Image | None) -> list[Drawn]:
    """Square pictures in turn of eight kinds: crops of a photo, shapes, words, noise, gradients, stripes, plain colours."""
    kinds: list[Callable[[int, int], Drawn]]
    kinds = [_shape, _sign, _soft_noise, _fine_noise, _gradient, _stripes, _plain]
    if photo is not None:
        kinds.insert(0, partial(_crop, photo))
    return [kinds[i % len(kinds)](i // len(kinds), side) for i in range(count)]


def word_pictures(count: int, side: int) -> list[Drawn]:
    """Square pictures of words, with prompts that quote a word: it is drawn as it is, without its end, or backwards."""
    found = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        drawn = (word, word[: -1 - i % 2], word[::-1])[i % 3]
        picture, paper = _written(drawn, i // (3 * len(WORDS)), side)
        found.append((picture, f'a {paper} sign that says "{word}"'))
    return found


def _crop(photo: Image.Image, number: int, side: int) -> Drawn:
    """The whole width first, then ever closer looks at other places."""
    part = round(photo.width * (1, 0.7, 0.5, 0.35)[number % 4])
    rng = np.random.default_rng(number)
    left, top = (int(rng.integers(length - part + 1)) for length in photo.size)
    cut = photo.crop((left, top, left + part, top + part))
    return cut.resize((side, side), Image.Resampling.BICUBIC), "a portrait of a woman in uniform"


def _shape(number: int, side: int) -> Drawn:
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


def _sign(number: int, side: int) -> Drawn:
    word = WORDS[number % len(WORDS)]
    picture, paper = _written(word, number, side)
    return picture, f'a {paper} sign that says "{word}"'


def _written(word: str, number: int, side: int) -> Drawn:
    """A word in the middle of a sign, and the sign's colour."""
    ink, paper = (("black", "white"), ("white", "crimson"), ("gold", "midnightblue"))[number % 3]
    picture = Image.new("RGB", (side, side), paper)
    font = ImageFont.load_default(size=1.4 * side / len(word))
    ImageDraw.Draw(picture).text((side / 2, side / 2), word, ink, font, anchor="mm")
    return picture, paper


def _soft_noise(number: int, side: int) -> Drawn:
    coarse = np.random.default_rng(number).integers(0, 256, (3 + number, 3 + number, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), "a soft blur of colours"


def _fine_noise(number: int, side: int) -> Drawn:
    spread = (20, 60, 120, 255)[number % 4]
    noise = np.random.default_rng(number).integers(128 - spread // 2, 128 + (spread + 1) // 2, (side, side, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8)), "grey noise on a screen"


def _gradient(number: int, side: int) -> Drawn:
    ends = [COLOURS[number % 8], COLOURS[(number + 3) % 8]]
    colours = np.array([Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in ends], dtype=float)
    share = np.linspace(0, 1, side)[:, None, None]
    ramp = np.broadcast_to(colours[0] * (1 - share) + colours[1] * share, (side, side, 3)).round().astype(np.uint8)
    return Image.fromarray(ramp), f"a gradient from {ends[0]} to {ends[1]}"


def _stripes(number: int, side: int) -> Drawn:
    ink, paper = COLOURS[number % 4], COLOURS[4 + number % 4]
    picture = Image.new("RGB", (side, side), paper)
    draw, width = ImageDraw.Draw(picture), max(1, side >> (2 + number % 4))
    for start in range(0, side, 2 * width):
        draw.rectangle((start, 0, start + width - 1, side), fill=ink)
    return picture, f"{ink} and {paper} stripes"


def _plain(number: int, side: int) -> Drawn:
    colour = COLOURS[(3 * number + 4) % 8]
    return Image.new("RGB", (side, side), colour), f"a plain {colour} surface"
