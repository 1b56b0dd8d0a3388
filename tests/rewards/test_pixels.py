"""The tensor path has the pixels of the published Pillow pipelines, all of them, and the gradient of a float resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as TF

from rewards._models.preprocess import Preprocess
from rewards._models.resample import resize, resize_in_integers
from tests.oracles.published_pixels import MEAN, STD, cropped, pictures
from tests.oracles.tiny_rewards import some_images

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

side = st.integers(1, 90)


def noise(height: int, width: int, seed: int, count: int = 1) -> Tensor:
    """Hard edges everywhere: bicubic overshoots on both ends."""
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


@settings(max_examples=60, deadline=None)
@given(side, side, side, side, st.sampled_from(sorted(PILLOW)), st.integers(0, 99))
def test_every_level_is_pillow_s(
    height: int, width: int, to_height: int, to_width: int, filter: Any, seed: int
) -> None:
    images = noise(height, width, seed)
    # One axis at a time: which one Pillow takes first depends on its version.
    rows = pictures(images)[0].resize((to_width, height), PILLOW[filter])
    expected = np.asarray(rows.resize((to_width, to_height), PILLOW[filter]))
    levels, size = (images * 255).round().to(torch.uint8), (to_height, to_width)
    wanted = torch.tensor(expected).permute(2, 0, 1)[None]
    assert torch.equal(resize(levels, size, filter), wanted)
    assert torch.equal(resize_in_integers(levels, size, filter), wanted), "as on a GPU"


def test_no_images_have_no_pixels() -> None:
    assert resize(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), (4, 5), "bicubic").shape == (0, 3, 4, 5)


# Never is the image higher than wide and made smaller: Pillow 13 might take the columns first.
@pytest.mark.parametrize("height, width", [(224, 224), (512, 512), (300, 517), (224, 225), (100, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_transform_of_openai_s_clip(height: int, width: int, interpolation: Any) -> None:
    images = noise(height, width, 1)
    transform = Compose(
        [Resize(224, InterpolationMode(interpolation)), CenterCrop(224), ToTensor(), Normalize(MEAN, STD)]
    )
    found = Preprocess((224, 224), (224, 224), MEAN, STD, interpolation)(images)[0]
    assert torch.equal(found, transform(pictures(images)[0]))


@pytest.mark.parametrize("height, width", [(700, 512), (517, 300), (640, 90)])
def test_high_images(height: int, width: int) -> None:
    images = noise(height, width, 3)
    assert torch.equal(Preprocess((224, 224), (224, 224), MEAN, STD)(images), cropped(images, 224))


# As above, and the height never shrinks more than the width.
@pytest.mark.parametrize("height, width", [(64, 64), (65, 71), (37, 150), (240, 201), (64, 87)])
@pytest.mark.parametrize("size", [{"shortest_edge": 64}, {"height": 60, "width": 48}])
def test_the_processors_of_transformers(height: int, width: int, size: dict[str, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    crop = {"height": 50, "width": 48} if "shortest_edge" in size else None
    processor = CLIPImageProcessorPil(size=size, crop_size=crop, do_center_crop=crop is not None)
    images = noise(height, width, 2)
    expected = torch.as_tensor(processor(pictures(images), return_tensors="pt")["pixel_values"])
    found = Preprocess.of_transformers(processor.to_dict())(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # it divides by 255 in double precision


@pytest.mark.parametrize("change", [{"do_rescale": False}, {"resample": 1}, {"size": {"longest_edge": 9}}], ids=str)
def test_other_processors_are_refused(change: dict[str, Any]) -> None:
    config = {"size": {"height": 8, "width": 8}, "resample": 3, "image_mean": MEAN, "image_std": STD}
    Preprocess.of_transformers(config)
    with pytest.raises(ValueError, match="read are those that resize to a shortest edge or a height and"):
        Preprocess.of_transformers({**config, **change})


def test_floats_are_rounded_to_8_bits_first() -> None:
    images = torch.rand(2, 3, 40, 30)
    path = Preprocess((24, 24), (24, 24), MEAN, STD)
    assert torch.equal(path(images), path((images * 255).round() / 255))
    assert not torch.equal(path(images), path((images * 255).floor() / 255)), "to the nearest level"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_image_stays_broken_and_alone(value: float) -> None:
    images = torch.rand(3, 3, 40, 30)
    whole = Preprocess((24, 24), (24, 24), MEAN, STD)(images)
    images[1, 2, 5, 6] = value
    found = Preprocess((24, 24), (24, 24), MEAN, STD)(images)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("mode", ["shortest", "longest", "fit", "squash"])
@pytest.mark.parametrize("height, width", [(40, 40), (24, 24), (50, 33), (12, 30)])
def test_gradients_are_those_of_a_float_resize(mode: Any, height: int, width: int) -> None:
    path = Preprocess((24, 24), (24, 24), MEAN, STD, mode=mode)
    images = (0.25 + 0.5 * some_images(2, height, width)).requires_grad_()  # no overshoot: nothing is clamped
    found = path(images)
    assert torch.equal(found, path(images.detach())), "the value depends on whether a gradient is wanted"

    plain = images.detach().clone().requires_grad_()
    size = path._size(height, width)
    smooth = TF.center_crop(TF.resize(plain, list(size), antialias=True, interpolation=InterpolationMode.BICUBIC), [24])
    smooth = TF.normalize(smooth, list(MEAN), list(STD))
    inside = TF.center_crop(torch.ones(2, 3, *size), [24])  # the margin is filled before it is normalised
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    smooth.backward(cotangent * inside)
    torch.testing.assert_close(images.grad, plain.grad)


def test_without_rounding_the_path_is_within_a_thousandth_of_pillow_s_floats() -> None:
    """What gradients are taken of: Pillow's own resize of float images."""
    images = some_images(1, 61, 47)
    path = Preprocess((24, 24), (24, 24), (0.0,) * 3, (1.0,) * 3, mode="squash")
    bands = [Image.fromarray(band.numpy(), "F").resize((24, 24), PILLOW["bicubic"]) for band in images[0]]
    expected = torch.tensor(np.stack([np.asarray(band) for band in bands]))
    smooth = TF.resize(images, [24, 24], InterpolationMode.BICUBIC, antialias=True)[0]
    torch.testing.assert_close(smooth, expected, rtol=0, atol=1e-3)
    assert (path(images)[0] - expected.clamp(0, 1)).abs().max() <= 1.5 / 255
