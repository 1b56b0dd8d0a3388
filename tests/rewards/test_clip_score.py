"""CLIP score and zero-shot classes on models in transformers' layout, their gradients and precisions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from rewards._models.open_clip import OpenClip
from rewards.classifier import Classifier
from rewards.clip_score import ClipScore
from tests.oracles.published_pixels import PROMPTS, check_gradient, cropped
from tests.oracles.published_weights import folder, hub_cache, siglip, transformers_clip, transformers_clip_processor
from tests.oracles.tiny_rewards import CLASSES, some_images, tiny_clip


@lru_cache
def whole_clip() -> Path:
    """As openai/clip-vit-base-patch32: model, tokenizer and processor in one folder."""
    found = folder("clip")
    for source in (transformers_clip_processor(), transformers_clip()):  # the model's config.json is the right one
        shutil.copytree(source, found, dirs_exist_ok=True)
    return found


def a_reward(**settings: Any) -> ClipScore:
    return ClipScore(str(whole_clip()), **settings)


@lru_cache
def by_transformers() -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(whole_clip()).eval(), CLIPTokenizer.from_pretrained(whole_clip())


def logits(pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """(batch, texts), by transformers' own forward on normalised images."""
    model, tokenizer = by_transformers()
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    return model(**tokens, pixel_values=pixels).logits_per_image


def cosines(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.diagonal(logits(pixels, prompts)) / by_transformers()[0].logit_scale.exp().detach()


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (40, 56)])
def test_it_is_the_cosine_of_transformers(height: int, width: int) -> None:
    images = some_images(5, height, width)
    with torch.no_grad():
        pixels = cropped(images, 32)
        expected, among = cosines(pixels, PROMPTS), logits(pixels, CLASSES).log_softmax(1)
    assert expected.std() > 0.05
    torch.testing.assert_close(a_reward(scale=2.5, batch=2)(images, PROMPTS), 2.5 * expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(a_reward().classify(images, CLASSES), among, rtol=1e-4, atol=1e-3)
    zero_shot = Classifier([1, 2], classes=CLASSES, model=str(whole_clip()))
    torch.testing.assert_close(zero_shot(images, PROMPTS), among[:, 1:].logsumexp(1), rtol=1e-4, atol=1e-3)


def test_an_image_is_looked_at_once_whatever_is_asked_of_it() -> None:
    """An evaluation asks for its embedding and its class in each factor. Another tensor is another image, also one written to."""
    judge, images = ClipScore("emoji-clip"), some_images(3, 64, 64)
    looks: list[int] = []
    judge.load_weights()
    judge.clip.model.visual.register_forward_hook(lambda *_: looks.append(1))
    first = judge.embed(images)
    classes = judge.classify(images, CLASSES)
    assert len(looks) == 1
    torch.testing.assert_close(judge.classify(images.clone(), CLASSES), classes, rtol=0, atol=0)
    torch.testing.assert_close(judge.embed(images), first, rtol=0, atol=0)
    assert len(looks) == 3
    images.mul_(0.5)
    assert not torch.equal(judge.embed(images), first)
    followed = images.clone().requires_grad_()
    for _ in range(2):  # each with a graph of its own
        judge.clip.images(followed).sum().backward()
    assert len(looks) == 6


def test_gradient() -> None:
    check_gradient(a_reward(grad=True, scale=10.0), lambda pixels, prompts: 10 * cosines(pixels, prompts), 32)


def test_the_value_is_a_step_function_and_its_gradient_that_of_the_slope_through_the_steps() -> None:
    """Less than half a level moves nothing; over several levels r changes as its gradient says."""
    reward = ClipScore(str(tiny_clip()), grad=True)
    images = (torch.randint(20, 236, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255).requires_grad_()
    values = reward(images, PROMPTS[:2])
    values.sum().backward()
    assert images.grad is not None
    exact, gradient = images.detach(), images.grad
    assert torch.equal(reward(exact + 0.4 / 255, PROMPTS[:2]), reward(exact, PROMPTS[:2]))
    size = gradient.abs().flatten(1)
    step = 3 / 255 * gradient.sign() * (size >= size.topk(16).values[:, -1:]).view_as(gradient)
    change = (reward(exact + step, PROMPTS[:2]) - reward(exact - step, PROMPTS[:2])) / 2
    torch.testing.assert_close(change, (gradient * step).sum((1, 2, 3)), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("model", [tiny_clip, whole_clip])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(model: Any, dtype: Any) -> None:
    images = some_images(5)
    exact, half = ClipScore(str(model())), ClipScore(str(model()), dtype=dtype)
    found = half(images, PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(images, PROMPTS), rtol=0, atol=0.03)
    assert not torch.equal(found, exact(images, PROMPTS))
    torch.testing.assert_close(half.embed(images).norm(dim=1), torch.ones(5))


def test_a_name_of_the_hub_is_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file.name: file for file in whole_clip().iterdir()}
    hub_cache(tmp_path, "openai/clip-vit-base-patch32", files, monkeypatch)
    found = build({"component": "clip_score", "model": "openai/clip-vit-base-patch32"}, "reward")
    assert torch.equal(found(some_images(5), PROMPTS), a_reward()(some_images(5), PROMPTS))


def test_of_which_library_a_model_is() -> None:
    assert isinstance(ClipScore(str(tiny_clip())).clip, OpenClip)
    assert isinstance(ClipScore(f"local-dir:{tiny_clip()}").clip, OpenClip)
    assert not isinstance(a_reward().clip, OpenClip)
    with pytest.raises(ValueError, match="'ViT-B/32' needs `weights`"):
        describe({"component": "clip_score", "model": "ViT-B/32"}, "reward")


def test_another_kind_of_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"of type 'siglip', wanted is one of \('clip',\)"):
        describe({"component": "clip_score", "model": str(siglip("siglip"))}, "reward")
    files = {file.name: file for file in siglip("siglip2").iterdir() if file.is_file()}
    hub_cache(tmp_path, "google/siglip", files, monkeypatch)
    with pytest.raises(ValueError, match=r"'google/siglip' is a model of type 'siglip', wanted is one of \('clip',\)"):
        Classifier(0, classes=CLASSES, model="google/siglip").load_weights()


@pytest.mark.parametrize("change, message", [({"dtype": "half"}, "half"), ({"grad": 2}, "grad")], ids=str)
def test_bad_arguments(change: Any, message: str) -> None:
    for attempt in (describe, build):
        with pytest.raises(ValueError, match=message):
            attempt({"component": "clip_score", "model": str(tiny_clip()), **change}, "reward")
