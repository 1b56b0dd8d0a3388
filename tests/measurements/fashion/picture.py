"""The first pictures of every row of a class, one line each, from the sheets beside the runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_picture"]

ACROSS, SIDE, SCALE, WORDS = 12, 32, 1.5, 190
"""Pictures in a line of a sheet, their side in a sheet in pixels, by how much they are enlarged, room for names."""


def draw_picture(sheets: Path, target: str, names: Mapping[str, str], path: Path) -> None:
    """One line for each row that has a sheet, with its name.

    Args:
        sheets: Folder of TARGET.METHOD.png.
        target: A class.
        names: Title of each method, in order; their Markdown is not shown.
        path: The PNG file.
    """
    there = [(method, sheets / f"{target}.{method}.png") for method in names]
    lines = [(names[method].strip("*"), file) for method, file in there if file.is_file()]
    side = round(SIDE * SCALE)
    page = Image.new("L", (WORDS + ACROSS * side, len(lines) * side), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for line, (name, file) in enumerate(lines):
        draw.text((4, (line + 0.5) * side), name, fill=0, font=font, anchor="lm")
        sheet = Image.open(file).convert("L")
        unit = sheet.width // ACROSS
        strip = sheet.crop((0, 0, sheet.width, unit)).resize((ACROSS * side, side), Image.Resampling.BICUBIC)
        page.paste(strip, (WORDS, line * side))
    page.save(path, optimize=True)
