"""The pictures on a sheet are the pictures given, where they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from diffusion_rtb.files.pictures import _Layout, grid, save_png, side_by_side, to_pil


def colours(*shape: int) -> Tensor:
    """Flat pictures, each of another colour."""
    count = int(torch.tensor(shape).prod())
    return torch.rand(count, 3, 1, 1).expand(-1, -1, 64, 64).unflatten(0, shape)


def count_pixels(sheet: Image.Image, image: Tensor) -> int:
    colour = to_pil(image).getpixel((0, 0))
    flat = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(-1, 3)
    return int((flat == torch.tensor(colour, dtype=torch.uint8)).all(1).sum())


def test_levels_are_rounded_and_clipped() -> None:
    picture = to_pil(torch.tensor([[[-0.5]], [[0.5]], [[2.0]]]))
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    images = colours(6)
    sheet = grid(images, columns=3)
    for image in images:
        assert count_pixels(sheet, image) == 128 * 128


def test_large_pictures_are_shrunk() -> None:
    sheet = grid(torch.zeros(1, 3, 512, 256), columns=1)
    assert count_pixels(sheet, torch.zeros(3, 1, 1)) == 256 * 128


def test_captions_titles_and_headers_take_room_and_cover_nothing() -> None:
    images = colours(4)
    plain = grid(images, columns=2)
    sheet = grid(images, 2, ["reward -1.5"] * 4, rows=["a cat emoji", "a dog"], headers=["prior", "posterior"])
    assert sheet.height > plain.height
    assert sheet.width > plain.width
    for image in images:
        assert count_pixels(sheet, image) == 128 * 128


def test_side_by_side_puts_the_prior_left_and_the_posterior_right() -> None:
    prior, posterior = colours(2, 3), colours(2, 3)
    sheet = side_by_side(prior, posterior, ["a cat emoji", "an apple"], captions=([["1"] * 3] * 2, [["2"] * 3] * 2))
    half = sheet.crop((0, 0, sheet.width // 2, sheet.height))
    for image in prior.flatten(0, 1):
        assert count_pixels(half, image) == 128 * 128
    for image in posterior.flatten(0, 1):
        assert count_pixels(half, image) == 0
        assert count_pixels(sheet, image) == 128 * 128


def test_side_by_side_keeps_rows_apart() -> None:
    prior, posterior = colours(2, 1), colours(2, 1)
    sheet = side_by_side(prior, posterior, ["one", "two"])
    lower = sheet.crop((0, sheet.height // 2 + 16, sheet.width, sheet.height))
    assert count_pixels(lower, posterior[0, 0]) == 0
    assert count_pixels(lower, posterior[1, 0]) == 128 * 128


@pytest.mark.parametrize("text", ["", "short", "a red fire engine on a blue background in a flat style", "x" * 60])
def test_text_is_wrapped_without_loss(text: str) -> None:
    font = ImageFont.load_default(12)
    lines = _Layout.wrapped(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_png_is_written_whole_and_alone(tmp_path: Path) -> None:
    sheet = grid(colours(2), columns=2)
    path = save_png(sheet, tmp_path / "deep" / "sheet.png")
    with Image.open(path) as found:
        assert found.tobytes() == sheet.tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 3, 8, 8), "columns": 1}, "at least one image"),
        ({"images": torch.zeros(2, 3, 8, 8), "columns": 0}, "columns must be at least 1, got 0"),
        (
            {"images": torch.zeros(2, 3, 8, 8), "columns": 2, "captions": ["a"]},
            "2 images needs as many captions, got 1",
        ),
        ({"images": torch.zeros(2, 3, 8, 8), "columns": 2, "rows": ["a", "b"]}, "need 1 row titles, got 2"),
        ({"images": torch.zeros(3, 3, 8, 8), "columns": 3, "headers": ["a", "b"]}, "3 columns cannot be split into 2"),
    ],
)
def test_texts_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**arguments)  # type: ignore[arg-type]


def test_sides_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        side_by_side(colours(1, 2), colours(1, 3), ["a"])
