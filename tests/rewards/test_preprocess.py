"""The tensor path equals the libraries' own transforms on PIL images, and gradients pass through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import functional as TF

from rewards._models.preprocess import Preprocess
from tests.oracles.tiny_rewards import some_images

CONFIGS: list[dict[str, Any]] = [
    {"size": 64},
    {"size": 96, "interpolation": "bilinear"},
    {"size": (48, 96)},
    {"size": 50, "resize_mode": "squash"},
    {"size": 96, "resize_mode": "longest"},
    {"size": (60, 50), "resize_mode": "longest", "fill_color": 128},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("height, width", [(64, 64), (100, 81), (37, 150), (240, 200)])
def test_open_clip(config: dict[str, Any], height: int, width: int) -> None:
    settings = PreprocessCfg(**config)
    images = some_images(2, height, width)
    transform = image_transform_v2(settings, is_train=False)
    expected = torch.stack([transform(TF.to_pil_image(x)) for x in images])
    found = Preprocess.of_open_clip(vars(settings))(images)
    error = (found - expected).abs() * torch.tensor(settings.std)[:, None, None]  # back in units of [0, 1]
    # PIL rounds to 8 bits after each of the two passes of a resize.
    assert error.max() < 3 / 255
    assert error.mean() < 0.5 / 255


def test_without_a_resize_nothing_is_rounded() -> None:
    settings = PreprocessCfg(size=32)
    images = some_images(2)
    expected = torch.stack([image_transform_v2(settings, is_train=False)(TF.to_pil_image(x)) for x in images])
    torch.testing.assert_close(Preprocess.of_open_clip(vars(settings))(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_gradients_pass(mode: Any) -> None:
    path = Preprocess((12, 12), (12, 12), (0.5,) * 3, (0.25,) * 3, mode=mode)
    images = (0.3 + 0.4 * torch.rand(1, 3, 16, 20)).requires_grad_()
    path(images).sum().backward()
    assert images.grad is not None
    if mode == "squash":  # each of 12·12 outputs is a weighted mean of inputs, times 1/0.25
        torch.testing.assert_close(images.grad.sum(), torch.tensor(3 * 12 * 12 / 0.25))
    assert images.grad.abs().sum() > 0


def test_what_leaves_the_range_by_interpolation_comes_back() -> None:
    checks = (torch.arange(8) % 2).float().expand(1, 3, 8, 8)
    path = Preprocess((29, 29), (29, 29), (0.0,) * 3, (1.0,) * 3)
    assert path(checks).min() >= 0
    assert path(checks).max() <= 1
    black = Image.new("RGB", (8, 8))
    assert path(TF.to_tensor(black)[None]).abs().max() == 0
