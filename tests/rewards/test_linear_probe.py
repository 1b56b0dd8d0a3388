"""A linear probe is one layer on the model's unit vectors; the bundled one knows the taste that it was fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import emoji_clip, emoji_taste
from rewards.linear_probe import LinearProbe
from tests.oracles.tiny_rewards import some_images

PROMPTS = ["a cat emoji"] * 5


def by_hand(images: Tensor) -> Tensor:
    """<w, e> + b, from the file and open_clip's own model."""
    head = load_file(emoji_taste.path() / "head.safetensors")
    model, _ = emoji_clip.load()
    return emoji_clip.encode(model, images) @ head["weight"][0] + head["bias"]


def test_it_is_one_layer_on_unit_vectors() -> None:
    images = (some_images(5, 64, 64) * 255).round() / 255
    found = LinearProbe(batch=2, scale=3.0)(images, PROMPTS)
    with torch.no_grad():
        torch.testing.assert_close(found, 3 * by_hand(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(found, LinearProbe(batch=2, scale=3.0)(images, ["another"] * 5)), "the prompt plays no part"


def test_its_gradient() -> None:
    # Off the bounds, where rounding cuts the gradient.
    images = ((some_images(2, 64, 64) * 200 + 20).round() / 255).requires_grad_()
    (found,) = torch.autograd.grad(LinearProbe(grad=True)(images, PROMPTS[:2]).sum(), images)
    (expected,) = torch.autograd.grad(by_hand(images).sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert not LinearProbe()(images, PROMPTS[:2]).requires_grad


def taste(picture: np.ndarray) -> tuple[float, float]:
    """Symmetry and colourfulness (Hasler and Süsstrunk, 2003), as pipelines/emoji/build/taste.py states them."""
    r, g, b = picture[..., 0], picture[..., 1], picture[..., 2]
    rg, yb = r - g, (r + g) / 2 - b
    spread, mean = np.hypot(rg.std(), yb.std()), np.hypot(rg.mean(), yb.mean())
    return float(-abs(picture - picture[:, ::-1]).mean()), float(spread + 0.3 * mean)


def test_the_bundled_one_likes_what_is_symmetric_and_colourful() -> None:
    sheet = np.asarray(Image.open("pipelines/emoji/sheet.png").convert("RGB"), dtype=np.float64) / 255
    # 64 cells of 168 x 152 with a picture of 64 pixels twice as large in each.
    cells = [sheet[y + 4 : y + 132 : 2, x + 12 : x + 140 : 2] for y in range(0, 1344, 168) for x in range(0, 1216, 152)]
    rule = np.array([taste(cell) for cell in cells])
    score = ((rule - rule.mean(0)) / rule.std(0)).sum(1)
    images = torch.tensor(np.stack(cells)).permute(0, 3, 1, 2).float()
    found = LinearProbe()(images, [""] * len(cells)).numpy()
    assert np.corrcoef(found, score)[0, 1] > 0.6
    for part in rule.T:
        assert np.corrcoef(found, part)[0, 1] > 0.25


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No weights file at nowhere\.safetensors"):
        LinearProbe("nowhere.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    save_file({"weight": torch.zeros(1, 96), "bias": torch.zeros(1)}, narrow)
    with pytest.raises(ValueError, match=r"128 dimensions, the head .* expects 96.*name that one in `model`"):
        LinearProbe(str(narrow)).load_weights()
    two = tmp_path / "two.safetensors"
    save_file({"weight": torch.zeros(2, 128), "bias": torch.zeros(2)}, two)
    with pytest.raises(ValueError, match="no head of 5 linear layers"):
        LinearProbe(str(two)).load_weights()
