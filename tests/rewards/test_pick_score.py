"""PickScore equals transformers' CLIPModel on its own processor, from folders in the published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from rewards.pick_score import PickScore
from tests.oracles.published_pixels import PROMPTS, check_gradient, cropped, pictures
from tests.oracles.published_weights import hub_cache, published, siglip, transformers_clip, transformers_clip_processor
from tests.oracles.tiny_rewards import some_images


def a_reward(**settings: Any) -> PickScore:
    return PickScore(**published("pick_score"), **settings)


@lru_cache
def by_transformers() -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(transformers_clip()).eval(), CLIPTokenizer.from_pretrained(
        transformers_clip_processor()
    )


def oracle(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """`logits_per_text` of images and prompts together in one call, padded to the longest prompt."""
    model, tokenizer = by_transformers()
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    return torch.diagonal(model(**tokens, pixel_values=pixels).logits_per_text)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (48, 41), (37, 90)])
def test_it_is_the_logit_of_transformers(height: int, width: int) -> None:
    images = some_images(5, height, width)
    prompts = [*PROMPTS[:3], "a cat, " * 60, ""]
    with torch.no_grad():
        expected = oracle(centred(images), prompts)
    assert expected.std() > 5
    torch.testing.assert_close(a_reward(batch=2)(images, prompts), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a_reward(scale=1 / 26)(images, prompts), expected / 26, rtol=1e-4, atol=1e-4)


def centred(images: Tensor) -> Tensor:
    """As the published processor: `cropped`, except where an odd margin is cut: transformers rounds down."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if images.shape[2] > images.shape[3]:  # a Pillow that takes columns first would differ
        return cropped(images, 32)
    processor = CLIPImageProcessorPil.from_pretrained(transformers_clip_processor())
    return torch.as_tensor(processor(pictures(images), return_tensors="pt")["pixel_values"])


def test_gradient() -> None:
    check_gradient(a_reward(grad=True), oracle, 32)


def test_the_tokens_are_clip_s() -> None:
    """The written tokenizer files are those of the real model: open_clip's own tokenizer has the same numbers."""
    tokenizer = a_reward().clip.tokenizer
    for text in (*PROMPTS, "An astronaut's glove, 50mm!"):
        ids = tokenizer([text])["input_ids"][0]
        assert open_clip.get_tokenizer("ViT-H-14")([text])[0, : len(ids)].tolist() == ids


def test_the_published_names_are_taken_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {file.name: file for file in transformers_clip().iterdir()}
    processor = {file.name: file for file in transformers_clip_processor().iterdir()}
    hub_cache(tmp_path, "yuvalkirstain/PickScore_v1", model, monkeypatch)
    hub_cache(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", processor, monkeypatch)
    images = some_images(5)
    found = build({"component": "pick_score"}, "reward")(images, PROMPTS)
    torch.testing.assert_close(found, a_reward()(images, PROMPTS))
    with pytest.raises(ValueError, match="The weights of 'someone/else' cannot be loaded"):
        PickScore("someone/else").load_weights()


def test_the_learned_scale_is_a_factor() -> None:
    reward = a_reward()
    images = some_images(5)
    assert reward.clip.scale == pytest.approx(2.718281828**4.6, rel=1e-5)
    cosines = reward(images, PROMPTS) / reward.clip.scale
    assert cosines.abs().max() <= 1


def test_the_old_format_of_weights_is_read_without_pickle(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(transformers_clip(), tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    images = some_images(2)
    found = PickScore(str(folder), str(transformers_clip_processor()))(images, PROMPTS[:2])
    torch.testing.assert_close(found, a_reward()(images, PROMPTS[:2]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: Any) -> None:
    images = some_images(5)
    half = a_reward(dtype=dtype)(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, a_reward()(images, PROMPTS), rtol=0, atol=3.0 if dtype == "bfloat16" else 0.5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"model": "PickScore"},
            FileNotFoundError,
            "neither a folder on this machine nor a hub id of the form OWNER/NAME",
        ),
        ({"model": "./weights/pick"}, FileNotFoundError, "neither a folder"),
        ({"processor": "/no/where"}, FileNotFoundError, "neither a folder"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"dtype": "half"}, ValueError, "half"),
        ({"scale": 0.0}, ValueError, r"scale is 0\.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_loads(change: Any, error: Any, message: str) -> None:
    component = {"component": "pick_score", **published("pick_score"), **change}
    with pytest.raises(error, match=message):
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def refused(model: Path, error: type[Exception], message: str, processor: Path | None = None) -> None:
    component = {
        "component": "pick_score",
        "model": str(model),
        "processor": str(processor or transformers_clip_processor()),
    }
    with pytest.raises(error, match=message):
        describe(component, "reward")


def test_folders_that_are_not_a_model_s_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, FileNotFoundError, r"There is no .*config\.json")
    refused(siglip("siglip"), ValueError, r"of type 'siglip', wanted is one of \('clip',\)")
    refused(
        transformers_clip(),
        FileNotFoundError,
        "has no image processor: it needs preprocessor_config",
        transformers_clip(),
    )
    folder = Path(shutil.copytree(transformers_clip(), tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, ValueError, r"model\.safetensors is truncated")
    weights.unlink()
    refused(folder, FileNotFoundError, r"has no weights: it needs model\.safetensors or pytorch_model\.bin")


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(transformers_clip_processor(), tmp_path / "processor"))
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "size": 40, "crop_size": 40}))
    with pytest.raises(ValueError, match=r"makes images of \(40, 40\) pixels, .* takes \(32, 32\)"):
        PickScore(str(transformers_clip()), str(folder)).load_weights()
