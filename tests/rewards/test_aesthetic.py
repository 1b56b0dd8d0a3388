"""The aesthetic predictor equals open_clip's CLIP with the published head written out, from files in their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from rewards._models.linear_head import LinearHead
from rewards._models.open_clip import OpenClip
from rewards.aesthetic import ARCHITECTURES, Aesthetic
from tests.oracles.published_pixels import PROMPTS, check_gradient, cropped
from tests.oracles.published_weights import (
    aesthetic_head,
    clip_config,
    clip_model,
    head_state,
    openai_archive,
    openai_clip,
    published,
)
from tests.oracles.tiny_rewards import some_images

ARCHITECTURE = ARCHITECTURES["ViT-L-14"]


def a_reward(**settings: Any) -> Aesthetic:
    return Aesthetic(**published("aesthetic"), **settings)


def oracle(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """As the published script: unit vector of CLIP's image network, then the linear layers one after the other."""
    x = clip_model(ARCHITECTURE).encode_image(pixels)
    x = x / x.norm(dim=-1, keepdim=True)
    state = head_state(x.shape[1])
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    return x[:, 0]


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (48, 40), (37, 90)])
def test_it_is_clip_with_a_linear_head(height: int, width: int) -> None:
    images = some_images(5, height, width)
    with torch.no_grad():
        expected = oracle(cropped(images, 32), PROMPTS)
    assert expected.std() > 0.5
    found = a_reward(batch=2)(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, a_reward(batch=2)(images, ["another"] * 5)), "the prompt plays no part"


def test_gradient() -> None:
    check_gradient(a_reward(grad=True), oracle, 32)


def test_the_head_has_the_published_names_and_sizes(tmp_path: Path) -> None:
    widths = (768, 1024, 128, 64, 16, 1)
    head = LinearHead(widths)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "layers.0.weight": (1024, 768), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024), "layers.2.bias": (128,),
        "layers.4.weight": (64, 128), "layers.4.bias": (64,), "layers.6.weight": (16, 64), "layers.6.bias": (16,),
        "layers.7.weight": (1, 16), "layers.7.bias": (1,),
    }  # fmt: skip
    again = LinearHead.sized(head.state_dict(), tmp_path)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes


def test_openai_s_activation_is_used() -> None:
    """Weights of OpenAI under the plain GELU of "ViT-L-14" load without a complaint and give other embeddings."""
    images = some_images(5)
    plain = OpenClip.of_file("ViT-L-14", str(openai_clip()), "shortest").images(images)
    assert (plain - a_reward().clip.images(images)).abs().max() > 1e-3
    assert clip_config(ARCHITECTURE)["quick_gelu"] is True
    assert "openai" in open_clip.list_pretrained_tags_by_model(ARCHITECTURE)
    preprocess: Any = open_clip.get_pretrained_cfg(ARCHITECTURE, "openai")
    assert tuple(preprocess["mean"]) == a_reward().clip.preprocess.mean
    assert preprocess["resize_mode"] == a_reward().clip.preprocess.mode == "shortest"


def test_openai_s_own_archive_is_the_state_dict_in_it() -> None:
    images = some_images(5)
    found = Aesthetic(str(aesthetic_head()), str(openai_archive()))(images, PROMPTS)
    half = clip_model(ARCHITECTURE).state_dict()
    given = Aesthetic(str(aesthetic_head()), str(openai_archive())).clip.model.state_dict()
    assert {k: torch.equal(v, half[k].half().float()) for k, v in given.items()} == dict.fromkeys(half, True)
    torch.testing.assert_close(found, a_reward()(images, PROMPTS), rtol=0, atol=0.02)


@pytest.mark.parametrize("width", [12, 7])
def test_the_first_head_is_one_linear_layer(width: int, tmp_path: Path) -> None:
    """`sa_0_4_vit_l_14_linear.pth`: Linear(768, 1) on the unit vector; heads for other CLIPs have 512."""
    layer = torch.nn.Linear(width, 1)
    torch.save(layer.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    if width != 12:
        with pytest.raises(ValueError, match=r"in 12 dimensions, the head in .* expects 7: .*of 512 for ViT-B-16 or"):
            Aesthetic(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"), str(openai_clip())).load_weights()
        return
    images = some_images(5, 48, 40)
    reward = Aesthetic(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"), str(openai_clip()), grad=True)
    with torch.no_grad():
        vectors = clip_model(ARCHITECTURE).encode_image(cropped(images, 32), normalize=True)
        torch.testing.assert_close(reward(images, PROMPTS), layer(vectors)[:, 0], rtol=0, atol=1e-5)
    assert reward(images.requires_grad_(), PROMPTS).requires_grad


def test_another_architecture_has_its_own_number_of_heads(tmp_path: Path) -> None:
    """12 of 64 channels for ViT-B, not ViT-L's 16 of 48: no tensor shows it, so a wrong one must not pass."""
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    model = open_clip.model.CLIP(**config).eval()
    torch.save(model.state_dict(), tmp_path / "ViT-B-32.pt")
    head = torch.nn.Linear(512, 1)
    torch.save(head.state_dict(), tmp_path / "sa_0_4_vit_b_32_linear.pth")
    files = str(tmp_path / "sa_0_4_vit_b_32_linear.pth"), str(tmp_path / "ViT-B-32.pt")
    images = some_images(2, 224, 224)
    with torch.no_grad():
        expected = head(model.encode_image(cropped(images, 224), normalize=True))[:, 0]
    found = Aesthetic(*files, architecture="ViT-B-32")(images, PROMPTS[:2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"width 768 for images, this architecture has 1024: it is another one"):
        Aesthetic(*files).load_weights()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: Any) -> None:
    images = some_images(5)
    torch.testing.assert_close(a_reward(dtype=dtype)(images, PROMPTS), a_reward()(images, PROMPTS), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weights": "none.pth"}, FileNotFoundError, r"No weights file at none\.pth"),
        ({"clip": "laion"}, FileNotFoundError, "No weights file at laion"),
        ({"weights": "hf-hub:one"}, ValueError, "write hf-hub:OWNER/NAME/FILE"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"architecture": "ViT-H-14"}, ValueError, "ViT-L-14.*ViT-B-16.*ViT-B-32"),
        ({"dtype": "double"}, ValueError, "double"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_loads(change: Any, error: Any, message: str) -> None:
    component = {"component": "aesthetic", **published("aesthetic"), **change}
    with pytest.raises(error, match=message):
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    torch.save(head_state(10), file)
    with pytest.raises(ValueError, match=r"embeds images in 12 dimensions, the head in .*head\.pth expects 10"):
        Aesthetic(str(file), str(openai_clip())).load_weights()
    state = head_state(12)
    torch.save({**state, "layers.4.weight": torch.zeros(8, 11)}, file)
    with pytest.raises(ValueError, match=r"no head of 5 linear layers that ends in one number: .*\(8, 11\)"):
        Aesthetic(str(file), str(openai_clip())).load_weights()
    torch.save({**state, "layers.1.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"an aesthetic head: 1 unknown \(first: layers\.1\.weight\)"):
        Aesthetic(str(file), str(openai_clip())).load_weights()
    torch.save({f"layers.{i}.weight": torch.zeros(1, 1) for i in (0, 3, 6, 9, 11)}, file)
    with pytest.raises(ValueError, match=r"LAION's head with ReLU .* read are those without, e\.g\. sac\+logos\+ava1"):
        Aesthetic(str(file), str(openai_clip())).load_weights()
    with pytest.raises(ValueError, match="no head of 5 linear layers"):
        Aesthetic(str(openai_clip()), str(aesthetic_head())).load_weights()
