"""Rewards without weights: brightness and colour, against NumPy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageStat

from diffusion_rtb.config.components import build, describe
from rewards.brightness import Brightness
from rewards.colour import Colour
from tests.oracles.tiny_rewards import some_images

PROMPTS = ["a"] * 4


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]


def test_brightness_is_pillow_s_mean() -> None:
    images = some_images(4, 24, 40)
    means = [np.mean(ImageStat.Stat(picture).mean) / 255 for picture in pictures(images)]
    np.testing.assert_allclose(Brightness()(images, PROMPTS), means, rtol=1e-5)
    np.testing.assert_allclose(Brightness("darken")(images, PROMPTS), -np.array(means), rtol=1e-5)


def test_black_white_and_their_order() -> None:
    levels = torch.linspace(0, 1, 4)[:, None, None, None].expand(-1, 3, 5, 5)
    torch.testing.assert_close(Brightness()(levels, PROMPTS), torch.linspace(0, 1, 4))
    assert Colour("black")(levels, PROMPTS).tolist() == sorted(Colour("black")(levels, PROMPTS).tolist(), reverse=True)
    torch.testing.assert_close(Colour("black")(levels, PROMPTS), -torch.linspace(0, 1, 4).square())
    torch.testing.assert_close(Colour("white")(levels, PROMPTS), -(1 - torch.linspace(0, 1, 4)).square())


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.integers(0, 1000))
def test_colour_is_the_distance_of_mean_and_spread(levels: list[int], seed: int) -> None:
    images = some_images(4, 8, 8, seed=seed)
    x = images.double().permute(0, 2, 3, 1).flatten(1, 2).numpy()
    expected = -((x.mean(1) - np.array(levels) / 255) ** 2 + x.var(1)).mean(1)
    for colour in (
        [level / 255 for level in levels],
        "#{:02x}{:02x}{:02x}".format(*levels),
        "rgb({},{},{})".format(*levels),
    ):
        np.testing.assert_allclose(Colour(colour)(images, PROMPTS), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["tomato", "Navy", "white", "hsl(120, 100%, 50%)"])
def test_the_colour_itself_is_best(name: str) -> None:
    plain = torch.stack([torch.from_numpy(np.array(Image.new("RGB", (4, 4), name))).permute(2, 0, 1) / 255])
    assert Colour(name)(plain, ["a"]).item() == 0
    assert (Colour(name)(some_images(4), PROMPTS) < 0).all()


@pytest.mark.parametrize("reward", [Brightness("darken"), Colour([0.2, 0.5, 1.0])])
def test_gradients_are_the_derivatives(reward: Any) -> None:
    """Both are at most quadratic, so a central difference is exact up to rounding."""
    images = (0.2 + 0.6 * torch.rand(2, 3, 4, 4)).requires_grad_()
    reward(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    step = torch.randn_like(images)
    with torch.no_grad():
        ends = [reward(images + sign * 0.1 * step, PROMPTS[:2]).sum() for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 0.2, (images.grad * step).sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "component, message",
    [
        ({"component": "brightness", "sign": "lighter"}, "sign.*lighter"),
        ({"component": "colour", "colour": "tomatoe"}, "'tomatoe' is no colour. Did you mean 'tomato'"),
        ({"component": "colour", "colour": "#12345"}, "'#12345' is no colour"),
        ({"component": "colour", "colour": [255, 99, 71]}, r"three numbers in \[0, 1\]"),
        ({"component": "colour", "colour": [0.5, 0.5]}, r"three numbers in \[0, 1\]"),
        ({"component": "colour"}, "needs 'colour'"),
    ],
    ids=str,
)
def test_bad_arguments(component: dict[str, Any], message: str) -> None:
    for act in (describe, build):
        with pytest.raises(ValueError, match=message):
            act(component, "reward")


@pytest.mark.parametrize("given", [(1, 0, 0), [1, 0.5, 0]])
def test_whole_numbers_are_levels_too(given: Sequence[float]) -> None:
    reward = build({"component": "colour", "colour": list(given)}, "reward")
    plain = torch.tensor(given, dtype=torch.float32)[None, :, None, None].expand(1, 3, 2, 2)
    assert reward(plain, ["a"]).item() == 0
