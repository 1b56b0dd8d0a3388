"""The bundled `fashion-classifier`: right on real pictures, calibrated as its folder says, and its log-probabilities as rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffusion_rtb.config.components import build
from rewards import fashion_classifier
from rewards.classifier import Classifier
from rewards.embedders.features import Features

NAME = "fashion-classifier"
TOPS: list[int | str] = ["t-shirt", "pullover", "coat", "shirt"]
SHEET = (
    Path(__file__).parent / "fashion_test.png"
)  # the first four test pictures of each class, a row each; MIT, see its weights
LABELS = torch.arange(10).repeat_interleave(4)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Forty test pictures (40, 3, 32, 32) in [0, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(SHEET)))
    pictures = sheet.unflatten(0, (10, 32)).unflatten(2, (4, 32)).permute(0, 2, 1, 3).flatten(0, 1)
    return (pictures[:, None] / 255).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def oracle(images: Tensor) -> Tensor:
    """Logits of the network as timm alone loads it, on pictures as Pillow enlarges them."""
    network = timm.create_model("test_resnet", pretrained=False, num_classes=10).eval()
    network.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights().items()}
    )
    grey = [
        Image.fromarray((x[0] * 255).round().byte().numpy()).resize((64, 64), Image.Resampling.BILINEAR) for x in images
    ]
    pixels = torch.stack([torch.from_numpy(np.array(x)).float() for x in grey]) / 127.5 - 1
    with torch.no_grad():
        return network(pixels[:, None].expand(-1, 3, -1, -1))


def weights() -> dict[str, Tensor]:
    return load_file(fashion_classifier.path() / "model.safetensors")


def test_the_folder_is_small_licensed_and_holds_no_pickle() -> None:
    files = [file for file in fashion_classifier.path().iterdir() if file.is_file()]
    assert {file.suffix for file in files} <= {".py", ".json", ".safetensors", ".txt"}
    assert "LICENSE-fashion-mnist.txt" in {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 2e6


def test_it_reads_real_pictures(images: Tensor) -> None:
    found = Classifier("sneaker", model=NAME).log_probs(images)
    assert int((found.argmax(1) == LABELS).sum()) >= RIGHT


RIGHT = 36
"""Of 40."""


@pytest.mark.parametrize(
    ("target", "columns"), [("sneaker", [7]), (0, [0]), (TOPS, [0, 2, 4, 6]), (list(range(10)), range(10))]
)
def test_the_reward_is_the_log_probability_of_a_class_or_a_set(
    target: Any, columns: Any, images: Tensor, oracle: Tensor
) -> None:
    reward = build({"component": "classifier", "model": NAME, "target": target}, "reward")
    found = reward(images, [""] * len(images))
    expected = oracle.log_softmax(1)[:, list(columns)].logsumexp(1)
    torch.testing.assert_close(found, expected.clamp(max=0), rtol=1e-4, atol=1e-4)
    assert bool(found.isfinite().all())
    assert float(found.min()) > -15  # smoothed labels: no class is ruled out


def test_features_are_what_its_last_layer_sees(images: Tensor, oracle: Tensor) -> None:
    features, last = Features(NAME).embed(images), weights()
    logits = features @ last["fc.weight"].float().T + last["fc.bias"].float()
    torch.testing.assert_close(logits, oracle, rtol=1e-4, atol=1e-3)


def test_temperature_sharpens(images: Tensor, oracle: Tensor) -> None:
    found = Classifier("coat", model=NAME, temperature=0.5).log_probs(images)
    torch.testing.assert_close(found, (oracle / 0.5).log_softmax(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("given", [{"weights": "x.pth"}, {"classes": ["a", "b"]}, {"size": 32}])
def test_what_it_brings_itself_is_not_given(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"'fashion-classifier' is bundled with its own {name}: leave out"):
        Classifier(0, model=NAME, **given)
    if name != "classes":
        with pytest.raises(ValueError, match=f"bundled with its own {name}"):
            Features(NAME, **given)


def test_unknown_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"target 'sneakers' is not among the classes.*Did you mean 'sneaker'"):
        Classifier("sneakers", model=NAME)
