"""Spaces to measure in: networks with their real or random weights against their own layers, functions, and what is refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision
from torch import Tensor

from diffusion_rtb.config.components import build, describe, short_names
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.samples import draw
from diffusion_rtb.sampling.sampler import Sampler
from rewards import emoji_clip
from tests.oracles.pixel import PixelPrior, Signs, green
from tests.rewards.test_efficientnet import LITE, cropped, photo, published
from tests.rewards.test_efficientnet import forward as logits_of

MODULE = """
import torch

def levels(images, power=1.0):
    return images.flatten(2).mean(2) ** power

def reward(images, prompts):
    return images.flatten(1).mean(1)

def flat(images):
    return images.flatten(1).mean(1)

def broken(images):
    found = images.flatten(1).clone()
    found[2] = float("nan")
    return found

class Reward:
    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)

network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "spaces.py").write_text(MODULE)
    sys.modules.pop("spaces", None)
    importlib.invalidate_caches()
    return "spaces"


def embedder(**arguments: Any) -> Any:
    return build({"component": "features", **arguments}, "embedder")


def test_a_timm_network_gives_what_goes_into_its_last_layer() -> None:
    """With its ImageNet weights, on real pictures: the published last layer makes the published logits of it."""
    crops = cropped(photo(), 96)
    found = embedder(size=96, **LITE).embed(crops)
    assert found.shape == (6, 1280)
    state = published()
    made = found @ state["_fc.weight"].T + state["_fc.bias"]
    torch.testing.assert_close(made, logits_of(2 * crops - 1), rtol=0, atol=2e-3)


def test_a_torchvision_network_too(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    own = embedder(model="torchvision:resnet18", weights=str(tmp_path / "own.pth"), classes=7, size=32, batch=2)
    images = torch.rand(3, 3, 32, 32).mul(255).round() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((images - mean) / std)
        found = network.fc(own.embed(images))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.save(torchvision.models.squeezenet1_0(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="squeezenet1_0 ends in a AdaptiveAvgPool2d, not in a linear layer"):
        embedder(model="torchvision:squeezenet1_0", weights=str(tmp_path / "other.pth"))


def test_an_open_clip_model_gives_vectors_as_long_as_it_makes_them() -> None:
    side = open_clip.create_model(f"local-dir:{emoji_clip.path()}", require_pretrained=True).visual.image_size
    images = torch.rand(2, 3, *((side, side) if isinstance(side, int) else side)).mul(255).round() / 255
    found, unit = embedder().embed(images), build({"component": "clip_score"}, "embedder").embed(images)
    assert (found.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=1), unit)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "timm:tf_efficientnet_lite9"}, "timm has no classifier 'tf_efficientnet_lite9'. Did you mean"),
        ({"model": "timm:resnet18"}, "'timm:resnet18' needs `weights`"),
        ({"size": 64}, "size and classes are for torchvision and timm; 'emoji-clip'"),
        ({"model": "timm:resnet18", "classes": -1}, "classes is -1: it must be at least 0"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_it_is(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe({"component": "features", **arguments}, "embedder")


def drawn_with(tool: Any) -> Tensor:
    found, _ = draw(Sampler(PixelPrior(), green, ["a", "b"], 4), EvalConfig(), 3, 0, posterior=False, embedder=tool)
    assert found.embedding is not None
    return found.embedding


def test_a_function_of_images_is_a_space(mine: str) -> None:
    images = drawn_with(Signs()).shape
    assert drawn_with(build({"component": f"{mine}:network"}, "embedder")).shape == (images[0], 5)
    single, squared = (
        build({"component": f"{mine}:levels", "power": power}, "embedder")(torch.full((1, 3, 2, 2), 0.5))
        for power in (1, 2)
    )
    assert single.tolist() == [[0.5] * 3]
    assert squared.tolist() == [[0.25] * 3]


@pytest.mark.parametrize("name", ["reward", "Reward"])
def test_a_reward_that_does_not_embed_is_refused_with_the_remedy(mine: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"an embedder is called with \(images\).*A reward embeds where its class has a"
    ):
        describe({"component": f"{mine}:{name}"}, "embedder")
    with pytest.raises(ValueError, match=r"has no method embed\(images\) and is no function of images alone"):
        draw(Sampler(PixelPrior(), green, ["a"], 2), EvalConfig(), 2, 0, posterior=False, embedder=green)


def test_the_shelf_lists_what_embeds() -> None:
    assert {"clip_score", "features"} <= set(short_names("embedder"))
    assert "jpeg" not in short_names("embedder")
    with pytest.raises(ValueError, match="There is no embedder named 'jpeg'"):
        describe({"component": "jpeg"}, "embedder")


def test_features_without_a_value_name_the_sample(mine: str) -> None:
    tool = build({"component": f"{mine}:broken"}, "embedder")
    with pytest.raises(
        ValueError, match=r"eval\.embedder broken gave NaN or infinite features for sample 2 of prompt 'a'\."
    ):
        drawn_with(tool)
    with pytest.raises(
        ValueError, match=r"eval\.embedder flat answered \(4,\) for 4 images; it must be one vector each"
    ):
        drawn_with(build({"component": f"{mine}:flat"}, "embedder"))
