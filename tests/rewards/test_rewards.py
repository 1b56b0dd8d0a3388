"""Every reward keeps the contract, and equals what an independent implementation computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import rewards
from diffusion_rtb.config.components import build, short_names
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from rewards import emoji_clip
from rewards._models.open_clip import OpenClip
from rewards.classifier import Classifier
from rewards.clip_score import ClipScore
from rewards.jpeg import Jpeg
from rewards.weighted_sum import WeightedSum
from tests.oracles.published_weights import published
from tests.oracles.reward_contract import keeps_contract
from tests.oracles.tiny_rewards import CLASSES, MODEL, some_images, tiny_clip

PROMPTS = ["a cat emoji", "a dog emoji", "a cat emoji", "an emoji, flat style", "a blue thing"]


ELSEWHERE = {"ocr", "remote"}
"""Rewards that need words in the images, or a server: their own tests hold them to the contract."""

NAMES = [name for name in short_names("reward") if name not in ELSEWHERE and not name.startswith("_")]


def arguments(name: str) -> dict[str, Any]:
    """What a reward is built with here; one that is not listed is built with its defaults."""
    clip = {"model": str(tiny_clip())}
    inner = {"component": "clip_score", **clip}
    judged = {"component": "classifier", **clip, "classes": CLASSES, "target": 0}
    known: dict[str, dict[str, Any]] = {
        "clip_score": clip,
        "classifier": {**clip, "classes": CLASSES, "target": 0},
        "weighted_sum": {"rewards": [{"component": "jpeg", "weight": 0.5}, inner]},
        "clamp": {"reward": inner, "low": -1.0},
        "frames": {"reward": inner, "count": 4},
        "standardise": {"reward": inner, "mean": 0.1, "std": 0.2},
        "cached": {"reward": inner},
        "ensemble": {"rewards": [inner, {"component": "brightness"}], "k": 0.5},
        "constraint": {"classifier": judged, "limit": 0.1, "kind": "hinge"},
        "colour": {"colour": "tomato"},
        "density": {"density": {"mean": [0.5] * (3 * 48 * 40), "covariance": 10.0}},
    }
    return known.get(name) or published(name)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_in_the_folder_keeps_the_contract(name: str) -> None:
    reward = build({"component": name, **arguments(name)}, "reward")
    keeps_contract(reward, some_images(5, 48, 40), PROMPTS, name)


def test_every_reward_has_its_line_in_the_readme() -> None:
    text = (Path(rewards.__file__).parent / "README.md").read_text(encoding="utf-8")
    listed = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in text.splitlines() if row.startswith("| `")]
    assert sorted(name for names in listed for name in names) == sorted(
        name for name in short_names("reward") if not name.startswith("_") and name != "emoji_clip"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_image_has_no_reward(name: str, value: float) -> None:
    """It must not pass as a black one, which as a JPEG file would be small and good."""
    reward = build({"component": name, **arguments(name)}, "reward")
    images = some_images(5, 48, 40)
    images[3, 1, 20, 20] = value
    with pytest.raises(RewardError, match=r"image 3|raised RewardError"):
        evaluate_reward(reward, images, PROMPTS, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_reward_follows_its_images_to_their_device(name: str) -> None:
    reward = build({"component": name, **arguments(name)}, "reward")
    images = some_images(5, 48, 40)
    on_cpu = evaluate_reward(reward, images, PROMPTS, name)
    on_gpu = evaluate_reward(reward, images.to("cuda"), PROMPTS, name)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(evaluate_reward(reward, images, PROMPTS, name), on_cpu)


def by_open_clip(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts and the logit scale, by open_clip's own transform and forward."""
    name = f"local-dir:{tiny_clip()}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    inputs = torch.stack([transform(picture) for picture in pictures(images)])
    with torch.no_grad():
        return model.eval()(inputs, open_clip.get_tokenizer(name)(prompts))


@pytest.mark.parametrize("side, tolerance", [(32, 2e-6), (64, 0.01), (20, 0.01)])
def test_clip_score_is_open_clip_s_cosine(side: int, tolerance: float) -> None:
    images = some_images(5, side, side)
    image, text, _ = by_open_clip(images, PROMPTS)
    reward = ClipScore(str(tiny_clip()), scale=2.5, batch=2)
    # PIL rounds resized images to 8 bits; without a resize only the order of additions differs.
    torch.testing.assert_close(reward(images, PROMPTS), 2.5 * (image * text).sum(1), rtol=0, atol=2.5 * tolerance)
    torch.testing.assert_close(reward.embed(images), image, rtol=0, atol=tolerance)
    assert reward.embed(images).norm(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_a_text_is_embedded_once_and_alone() -> None:
    reward = ClipScore(str(tiny_clip()))
    seen: list[tuple[int, ...]] = []
    reward.clip.model.token_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    reward(some_images(5), PROMPTS)
    reward(some_images(2), PROMPTS[:2])
    assert seen == [(1, 16)] * len(set(PROMPTS))


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth with state_dict inside"])
def test_an_architecture_name_takes_a_local_file(tmp_path: Path, suffix: str) -> None:
    architecture = tmp_path / "tiny-arch.json"
    architecture.write_text(json.dumps(MODEL))
    open_clip.add_model_config(architecture)
    whole = ClipScore(str(tiny_clip()))
    state = whole.clip.model.state_dict()
    file = tmp_path / f"weights.{suffix.split()[0]}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if "inside" in suffix else state, file)
    from_file = ClipScore("tiny-arch", str(file)).clip
    assert isinstance(from_file, OpenClip)
    assert all(torch.equal(a, b) for a, b in zip(from_file.model.state_dict().values(), state.values(), strict=True))
    # A name carries no preprocessing of its own: open_clip's default holds.
    assert from_file.preprocess.mean == open_clip.OPENAI_DATASET_MEAN


def test_the_bundled_model_is_what_its_folder_says() -> None:
    if not (emoji_clip.path() / "open_clip_model.safetensors").is_file():
        pytest.skip("the weights of emoji-clip are not built: python -m pipelines.emoji.build")
    images = some_images(3, 64, 64)
    model, tokenizer = emoji_clip.load()
    reward = ClipScore()
    with torch.no_grad():
        torch.testing.assert_close(reward.embed(images), emoji_clip.encode(model, images), rtol=0, atol=1e-5)
        expected = emoji_clip.probabilities(model, images, tokenizer(CLASSES))
    torch.testing.assert_close(reward.classify(images, CLASSES).exp(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_zero_shot_is_open_clip_s_softmax(temperature: float) -> None:
    images = some_images(4)
    image, text, scale = by_open_clip(images, CLASSES)
    expected = (scale * image @ text.T / temperature).softmax(1)
    reward = Classifier("a dog emoji", classes=CLASSES, model=str(tiny_clip()), temperature=temperature, batch=3)
    torch.testing.assert_close(reward.log_probs(images).exp(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward(images, PROMPTS[:4]), expected[:, 1].log(), rtol=1e-4, atol=1e-5)
    two = Classifier([0, "a blue thing", 0], classes=CLASSES, model=str(tiny_clip()), temperature=temperature)
    torch.testing.assert_close(two(images, PROMPTS[:4]), (expected[:, 0] + expected[:, 2]).log(), rtol=1e-4, atol=1e-5)


def test_it_judges_other_classes_too() -> None:
    images, others = some_images(4), ["red", "green"]
    image, text, scale = by_open_clip(images, others)
    reward = Classifier(0, classes=CLASSES, model=str(tiny_clip()))
    expected = (scale * image @ text.T).log_softmax(1)
    torch.testing.assert_close(reward.classify(images, others), expected, rtol=1e-4, atol=1e-4)


def a_torchvision_network(file: Path) -> tuple[torch.nn.Module, Callable[[Image.Image], Tensor], dict[str, Any]]:
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    network = squeezenet1_1(num_classes=3)
    torch.save(network.state_dict(), file.with_suffix(".pth"))
    return network, SqueezeNet1_1_Weights.DEFAULT.transforms(), {
        "model": "torchvision:squeezenet1_1", "weights": str(file.with_suffix(".pth")),
    }  # fmt: skip


def a_timm_network(file: Path) -> tuple[torch.nn.Module, Callable[[Image.Image], Tensor], dict[str, Any]]:
    import timm

    network: Any = timm.create_model("test_vit", num_classes=3)
    with torch.no_grad():
        network.head.weight.normal_(std=0.3)  # the initial 0 would not tell images apart
    save_file(network.state_dict(), file.with_suffix(".safetensors"))
    config = timm.data.resolve_data_config(model=network)  # type: ignore[attr-defined, no-untyped-call]
    transform: Any = timm.data.create_transform(**config, is_training=False)  # type: ignore[attr-defined]
    return network, transform, {"model": "timm:test_vit", "weights": str(file.with_suffix(".safetensors"))}


def test_zero_shot_gradients_where_they_are_asked_for() -> None:
    """Against open_clip's own forward on the same 8-bit levels, within the range."""
    images = 0.2 + 0.6 * some_images(2)
    images = (images * 255).round() / 255
    name = f"local-dir:{tiny_clip()}"
    model, text = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)(CLASSES)
    expected = images.clone().requires_grad_()
    image, texts, scale = model((expected - 0.5) / 0.4, text)
    (scale * image @ texts.T).log_softmax(1)[:, 0].sum().backward()
    asked = images.clone().requires_grad_()
    Classifier(0, classes=CLASSES, model=str(tiny_clip()), grad=True)(asked, PROMPTS[:2]).sum().backward()
    assert asked.grad is not None
    torch.testing.assert_close(asked.grad, expected.grad, rtol=1e-3, atol=1e-6)
    silent = Classifier(0, classes=CLASSES, model=str(tiny_clip()))(images.clone().requires_grad_(), PROMPTS[:2])
    assert not silent.requires_grad


@pytest.mark.parametrize("make", [a_torchvision_network, a_timm_network])
def test_a_trained_network_gives_its_own_softmax(make: Any, tmp_path: Path) -> None:
    network, transform, found = make(tmp_path / "weights")
    images = some_images(3, 300, 320)
    with torch.no_grad():
        expected = network.eval()(torch.stack([transform(p) for p in pictures(images)])).log_softmax(1)
    reward = Classifier("dog", classes=["cat", "dog", "cup"], **found, batch=2)
    torch.testing.assert_close(reward.log_probs(images), expected, rtol=0, atol=0.02)  # PIL rounds to 8 bits
    torch.testing.assert_close(reward(images, PROMPTS[:3]), expected[:, 1], rtol=0, atol=0.02)
    two = reward.classify(images, ["cup", "cat"])
    torch.testing.assert_close(two, expected[:, [2, 0]].log_softmax(1), rtol=0, atol=0.02)


def test_size_replaces_the_published_one(tmp_path: Path) -> None:
    _, _, found = a_torchvision_network(tmp_path / "weights")
    reward = Classifier(0, classes=["a", "b", "c"], size=48, **found)
    _, preprocess = reward._trained
    assert preprocess(some_images(2)).shape == (2, 3, 48, 48)


def test_jpeg_is_the_size_of_the_file(tmp_path: Path) -> None:
    images = some_images(3, 40, 24)
    sizes = []
    for i, picture in enumerate(pictures(images)):
        picture.save(tmp_path / f"{i}.jpg", quality=80)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size)
    compress = Jpeg(quality=80)(images, PROMPTS[:3])
    torch.testing.assert_close(compress, -torch.tensor(sizes) / 1000)
    torch.testing.assert_close(Jpeg("incompress", quality=80)(images, PROMPTS[:3]), -compress)
    per_pixel = Jpeg("incompress", unit="bits_per_pixel", quality=80)(images, PROMPTS[:3])
    torch.testing.assert_close(per_pixel, 8 * torch.tensor(sizes) / (40 * 24))


def test_jpeg_prefers_flat_images_and_low_quality() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), some_images(1, 64, 64)[0], torch.rand(3, 64, 64)])
    at = {quality: Jpeg(quality=quality)(images, PROMPTS[:3]) for quality in (10, 50, 95)}
    for values in at.values():
        assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert (at[10] >= at[50]).all()
    assert (at[50] >= at[95]).all()


def test_weighted_sum_adds_up() -> None:
    clip = {"component": "rewards.clip_score:ClipScore", "model": str(tiny_clip())}
    parts = [{**clip, "weight": 3.0, "name": "fit"}, {"component": "jpeg", "weight": -0.25}, {**clip, "scale": 2.0}]
    reward = WeightedSum(parts)
    images = some_images(5)
    fit, size = ClipScore(str(tiny_clip()))(images, PROMPTS), Jpeg()(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), 3.0 * fit - 0.25 * size + 2.0 * fit)


def broken(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))[:, None]


def test_the_broken_part_of_a_sum_is_named() -> None:
    reward = WeightedSum([{"component": "jpeg"}, {"component": f"{__name__}:broken", "name": "mine"}])
    with pytest.raises(RewardError, match=r"Reward 'mine' on images 0 to 4 returned shape \(5, 1\)"):
        reward(some_images(5), PROMPTS)
