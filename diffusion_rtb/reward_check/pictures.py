"""Pictures made to check rewards on, each with a fitting prompt; the same at every call."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["standard_pictures", "word_pictures"]

COLOURS = ("crimson", "royalblue", "seagreen", "gold", "black", "white", "hotpink", "saddlebrown")
WORDS = ("OPEN", "Coffee", "STOP", "exit 7", "Hello", "SALE", "Taxi", "2026")

Drawn = tuple[Image.Image, str]
"""A picture and its prompt."""


def standard_pictures(count: int, side: int) -> list[Drawn]:
    """Square pictures in turn of three kinds: shapes, words, noise from soft to fine."""
    kinds = (_shape, _sign, _noise)
    return [kinds[i % 3](i // 3, side) for i in range(count)]


def word_pictures(count: int, side: int) -> list[Drawn]:
    """Square pictures of words, with prompts that quote a word: it is drawn as it is, without its end, or backwards."""
    found = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        drawn = (word, word[: -1 - i % 2], word[::-1])[i % 3]
        picture, paper = _written(drawn, i // (3 * len(WORDS)), side)
        found.append((picture, f'a {paper} sign that says "{word}"'))
    return found


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


def _noise(number: int, side: int) -> Drawn:
    coarse = np.random.default_rng(number).integers(0, 256, (3 + 2 * number, 3 + 2 * number, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), "a blur of colours"
