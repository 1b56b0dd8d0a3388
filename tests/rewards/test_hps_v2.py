"""HPSv2 equals the published code, and open_clip's own forward on its pipeline, from files in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_rtb.config.components import build, describe
from rewards._models import two_towers as _two_towers
from rewards._models.open_clip import _sized
from rewards._models.preprocess import Preprocess
from rewards.hps_v2 import HpsV2
from tests.oracles.published_pixels import MEAN, PROMPTS, STD, check_gradient, padded
from tests.oracles.published_weights import clip_config, clip_model, hps_v2, hub_cache, published
from tests.oracles.tiny_rewards import some_images

PUBLISHED_PATH = Preprocess((224, 224), (224, 224), MEAN, STD, mode="fit")


def a_reward(**settings: Any) -> HpsV2:
    return HpsV2(**published("hps_v2"), **settings)


def oracle(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """open_clip's network with the file's float16 weights, as the published code calls it."""
    model = open_clip.model.CLIP(**clip_config("ViT-H-14")).eval()
    model.load_state_dict({k: v.half().float() for k, v in clip_model("ViT-H-14").state_dict().items()})
    tokens = open_clip.get_tokenizer("ViT-H-14", context_length=16)(list(prompts))
    image, text, _ = model(pixels, tokens)
    return torch.diagonal(image @ text.T)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (48, 40), (37, 90), (32, 20), (150, 33)])
def test_it_is_open_clip_s_cosine(height: int, width: int) -> None:
    images = some_images(5, height, width)
    with torch.no_grad():
        expected = oracle(padded(images, 32), PROMPTS)
    assert expected.std() > 0.03
    torch.testing.assert_close(a_reward(batch=2)(images, PROMPTS), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(a_reward(scale=100.0)(images, PROMPTS), 100 * expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("height, width", [(512, 512), (640, 90), (320, 45), (217, 224), (101, 640), (30, 20)])
def test_every_pixel_is_the_published_one(height: int, width: int) -> None:
    """640 x 90 is resized to 31.5 pixels of width: rounding there depends on how the ratio is written."""
    images = torch.randint(0, 256, (1, 3, height, width)) / 255
    torch.testing.assert_close(PUBLISHED_PATH(images), padded(images, 224), rtol=0, atol=5e-5)


def patterns(count: int, height: int, width: int) -> Tensor:
    """Images of 8-bit levels by a formula: hard edges everywhere, so that every resize overshoots."""
    sizes = (count, 3, height, width)
    b, c, i, j = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    return ((37 * i * i + 101 * j + 53 * c * i * j + 71 * b * j * j) % 256) / 255


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (48, 40, [0.061879, 0.203042, 0.099433, 0.390957, 0.324647]),
        (333, 1024, [0.089461, 0.221407, 0.096284, 0.287611, 0.320504]),
        (24, 20, [-0.039935, 0.320638, -0.033083, 0.134827, 0.026384]),
    ],
)
def test_scores_are_those_of_the_published_code(height: int, width: int, expected: list[float]) -> None:
    """`expected`: tgxs002/HPSv2 at 866735e, its image_transform, tokenizer and network with these weights, torchvision 0.29."""
    found = a_reward()(patterns(5, height, width), PROMPTS)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "height, width, expected, lowest, highest",
    [
        (150, 201, [-1.79226, 1.31192, 0.50365, -0.68627, -0.51837, 0.30543], -2.01621, 2.55424),
        (20, 30, [-1.79226, -1.79226, 0.42563, 0.60321, 0.45653, 0.47051], -2.07399, 2.57841),
    ],
)
def test_pixels_are_those_of_the_published_code(
    height: int, width: int, expected: list[float], lowest: float, highest: float
) -> None:
    """From the same code. No 8-bit picture gives less than -1.79226 or more than 2.14590: what overshoots stays."""
    found = PUBLISHED_PATH(patterns(1, height, width))[0]
    places = [(0, 0, 0), (0, 30, 7), (1, 100, 50), (2, 160, 223), (1, 112, 112), (2, 74, 1)]
    assert [float(found[place]) for place in places] == pytest.approx(expected, abs=2e-5)
    assert [float(found.min()), float(found.max())] == pytest.approx([lowest, highest], abs=2e-5)


def test_the_image_is_that_of_its_8_bit_file_before_it_is_resized() -> None:
    images = some_images(2, 48, 40)
    off = (images + 0.4 / 255 * torch.randn(images.shape).clamp(-1, 1)).clamp(0, 1)
    assert torch.equal(PUBLISHED_PATH(off), PUBLISHED_PATH(images))
    broken = images.clone()
    broken[0, 1, 7, 9] = float("nan")
    found = PUBLISHED_PATH(broken)
    assert found[0, :, :, 20:200].isnan().all(), "all but the padding"
    assert torch.equal(found[1], PUBLISHED_PATH(images)[1])


def test_the_gradient_through_a_resize_is_that_of_the_resize() -> None:
    """The resize is linear, so its derivative along any direction is the resize of that direction; padding gives nothing."""
    path = Preprocess((224, 224), (224, 224), (0.0,) * 3, (1.0,) * 3, mode="fit")
    images = (0.2 + 0.6 * torch.rand(1, 3, 150, 201)).requires_grad_()
    weights = torch.randn(1, 3, 224, 224)
    (weights * path(images)).sum().backward()
    assert images.grad is not None
    direction = (torch.randint(0, 256, images.shape) - 128) / 255  # whole levels, so that none is rounded
    base = torch.full_like(images.detach(), 128 / 255)
    expected = (weights * (path(base + direction) - path(base))).sum()
    torch.testing.assert_close((images.grad * direction).sum(), expected, rtol=1e-3, atol=1e-2)


def test_a_wide_image_is_padded_and_not_cropped() -> None:
    images = some_images(1, 32, 96)
    edge = images.clone()
    edge[..., :8] = 0.0
    assert not torch.allclose(a_reward()(edge, PROMPTS[:1]), a_reward()(images, PROMPTS[:1]))


def test_gradient() -> None:
    check_gradient(a_reward(grad=True, scale=100.0), lambda pixels, prompts: 100 * oracle(pixels, prompts), 32)


def test_published_sizes_come_out_of_published_weights() -> None:
    """The tensors of a real ViT-H-14 give open_clip's own configuration of it."""
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        state = open_clip.model.CLIP(**config).state_dict()
    assert len(state) == 32 * 12 + 24 * 12 + 14
    found = _sized(config, state, Path("HPS_v2.1_compressed.pt"))
    assert found["embed_dim"] == config["embed_dim"]
    assert found["vision_cfg"] == {**config["vision_cfg"], "mlp_ratio": 4.0}
    assert found["text_cfg"] == {**config["text_cfg"], "mlp_ratio": 4.0}


def test_versions_differ_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    negative = {k: -v if k == "text_projection" else v for k, v in clip_model("ViT-H-14").state_dict().items()}
    torch.save({"state_dict": negative}, tmp_path / "old.pt")
    files = {"HPS_v2.1_compressed.pt": hps_v2(), "HPS_v2_compressed.pt": tmp_path / "old.pt"}
    hub_cache(tmp_path / "cache", "xswu/HPSv2", files, monkeypatch)
    images = some_images(5)
    newer = build({"component": "hps_v2"}, "reward")(images, PROMPTS)
    assert torch.equal(newer, a_reward()(images, PROMPTS))
    older = build({"component": "hps_v2", "version": "v2.0"}, "reward")(images, PROMPTS)
    torch.testing.assert_close(older, -newer, rtol=0, atol=1e-3)  # one of the two was rounded to float16


def test_only_so_many_texts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_two_towers, "REMEMBERED", 2)
    reward, images = a_reward(), some_images(5)
    first = reward(images, PROMPTS)
    assert list(reward.clip._texts) == ["an emoji, flat style", "a blue thing"]
    assert torch.equal(reward(images, PROMPTS), first)
    assert len(reward.clip._texts) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: Any) -> None:
    images = some_images(5)
    half = a_reward(dtype=dtype)(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, a_reward()(images, PROMPTS), rtol=0, atol=0.02)


def test_vectors_have_unit_length_in_half_precision_too() -> None:
    clip = a_reward(dtype="bfloat16").clip
    vectors = clip.images(some_images(3))
    torch.testing.assert_close(vectors, normalize(vectors), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"version": "v2.2"}, ValueError, r"v2\.2.*v2\.0"),
        ({"weights": "none.pt"}, FileNotFoundError, r"No weights file at none\.pt"),
        ({"weights": "hf-hub:HPS_v2.1_compressed.pt"}, ValueError, "write hf-hub:OWNER/NAME/FILE"),
        ({"batch": -1}, ValueError, "batch is -1"),
        ({"dtype": "fp16"}, ValueError, "fp16.*float16"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_loads(change: Any, error: Any, message: str) -> None:
    component = {"component": "hps_v2", **published("hps_v2"), **change}
    with pytest.raises(error, match=message):
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    state = clip_model("ViT-H-14").state_dict()
    file = tmp_path / "HPS_v2_compressed.pt"

    def load(state: dict[str, Tensor]) -> None:
        torch.save({"state_dict": state}, file)
        HpsV2(weights=str(file)).load_weights()

    with pytest.raises(ValueError, match=r"a CLIP model like ViT-H-14: 1 missing \(first: visual\.ln_post\.bias\)"):
        load({k: v for k, v in state.items() if k != "visual.ln_post.bias"})
    with pytest.raises(ValueError, match=r"in open_clip's layout: it has no 'visual\.proj'"):
        load({k: v for k, v in state.items() if k != "visual.proj"})
    with pytest.raises(
        ValueError, match="width 30 for images and 32 for texts; they must be multiples of the 16 and 16"
    ):
        load({**state, "visual.conv1.weight": torch.zeros(30, 3, 8, 8)})
    load({**state, "attn_mask": torch.zeros(16, 16)})
