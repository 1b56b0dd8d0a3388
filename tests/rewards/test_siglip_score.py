"""SigLIP and SigLIP 2 equal transformers' own models on their own processors, and open_clip's own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_rtb.config.components import build, describe
from rewards._models.naflex import Naflex
from rewards.siglip_score import SiglipScore
from tests.oracles.published_pixels import PROMPTS, check_pixel_gradient, pictures
from tests.oracles.published_weights import drawn, folder, published, siglip, transformers_clip
from tests.oracles.tiny_rewards import some_images, tiny_clip

KINDS = ["siglip", "siglip2", "naflex"]

SIDES = [(32, 32), (64, 64), (40, 56), (24, 48)]


def a_reward(kind: str = "siglip", **settings: Any) -> SiglipScore:
    return SiglipScore(str(siglip(kind)), **settings)


@lru_cache
def by_transformers(kind: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and Pillow image processor."""
    import transformers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    pixels = Siglip2ImageProcessorPil if kind == "naflex" else SiglipImageProcessorPil
    tokenizer = transformers.SiglipTokenizer if kind == "siglip" else transformers.PreTrainedTokenizerFast
    model = transformers.Siglip2Model if kind == "naflex" else transformers.SiglipModel
    return (
        model.from_pretrained(siglip(kind)).eval(),
        tokenizer.from_pretrained(siglip(kind)),
        pixels.from_pretrained(siglip(kind)),
    )


def oracle(kind: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Logits of images and prompts together in one call."""
    model, tokenizer, processor = by_transformers(kind)
    tokens = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        inputs = processor(pictures(images), return_tensors="pt")
        return torch.diagonal(model(**inputs, input_ids=tokens).logits_per_text)


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_logit_of_transformers(kind: str, height: int, width: int) -> None:
    images = some_images(5, height, width)
    prompts = [*PROMPTS[:3], "a cat, " * 40, ""]
    expected = oracle(kind, images, prompts)
    assert expected.std() > 0.3
    torch.testing.assert_close(a_reward(kind, batch=2)(images, prompts), expected, rtol=0, atol=2e-5)
    found = a_reward(kind, output="log_prob", scale=2.0)(images, prompts)
    torch.testing.assert_close(found, 2 * logsigmoid(expected), rtol=0, atol=4e-5)
    cosines = a_reward(kind, output="cosine")(images, prompts)
    model = by_transformers(kind)[0]
    torch.testing.assert_close(model.logit_scale.exp() * cosines + model.logit_bias, expected, rtol=0, atol=2e-5)


def test_capitals_make_no_difference() -> None:
    """SigLIP and SigLIP 2 were trained on lower-case texts; not every published tokenizer sees to it."""
    images = some_images(5)
    for kind in ("siglip", "siglip2"):
        loud = [prompt.upper() for prompt in PROMPTS]
        assert torch.equal(a_reward(kind)(images, loud), a_reward(kind)(images, PROMPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind: str) -> None:
    """Against transformers' model on images of the network's size, and against steps of one 8-bit level."""
    reward = a_reward(kind, grad=True)
    model, tokenizer, _ = by_transformers(kind)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=64, return_tensors="pt").input_ids
    images = torch.randint(20, 236, (5, 3, 32, 32)) / 255
    wanted, found = images.clone().requires_grad_(), images.clone().requires_grad_()
    pixels = (wanted - 0.5) / 0.5
    inputs: dict[str, Tensor] = {"pixel_values": pixels}
    if kind == "naflex":
        rows = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(16, -1) for image in pixels]
        inputs = {"pixel_values": torch.stack(rows), "spatial_shapes": torch.tensor([[4, 4]] * 5)}
        inputs["pixel_attention_mask"] = torch.ones(5, 16, dtype=torch.int32)
    torch.diagonal(model(**inputs, input_ids=tokens).logits_per_text).sum().backward()
    values = reward(found, PROMPTS)
    values.sum().backward()
    check_pixel_gradient(reward, images, PROMPTS, found, wanted)
    reward.grad = False
    assert not reward(found, PROMPTS).requires_grad


@pytest.mark.parametrize("height, width", [(224, 224), (512, 512), (768, 512), (300, 1000), (17, 900), (3, 3)])
def test_naflex_has_the_published_sizes(height: int, width: int) -> None:
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    path = Naflex(16, 256, (0.5,) * 3, (0.5,) * 3)
    assert path.size(height, width) == get_image_size_for_max_num_patches(height, width, 16, 256)


def test_naflex_takes_any_shape_whole() -> None:
    """A change at the far end of a wide image counts: nothing is cropped."""
    images = some_images(1, 32, 96)
    edge = images.clone()
    edge[..., 88:] = 0
    reward = a_reward("naflex")
    assert (reward(edge, PROMPTS[:1]) - reward(images, PROMPTS[:1])).abs() > 1e-3


@lru_cache
def open_clip_siglip() -> Path:
    """A SigLIP of open_clip: its own text tower, with a bias; a timm trunk in the image tower."""
    found = folder("open-clip-siglip")
    config = {
        "embed_dim": 32, "init_logit_bias": -3, "custom_text": True,
        "vision_cfg": {"image_size": 32, "width": 32, "layers": 1, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
                     "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }  # fmt: skip
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"}
    (found / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    settings = {k: v for k, v in config.items() if k != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        model = drawn(open_clip.model.CustomTextCLIP(**settings), seed=4, spread=1.5)
    save_file(model.state_dict(), found / "open_clip_model.safetensors")
    return found


def test_it_is_open_clip_s_logit_too() -> None:
    name = f"local-dir:{open_clip_siglip()}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    images = some_images(5, 48, 56)
    with torch.no_grad():
        pixels = torch.stack([transform(picture) for picture in pictures(images)])
        image, text, scale, bias = model.eval()(pixels, open_clip.get_tokenizer(name)(PROMPTS))
    expected = scale * (image * text).sum(1) + bias
    assert bias.item() == -3
    assert expected.std() > 0.3
    torch.testing.assert_close(SiglipScore(str(open_clip_siglip()))(images, PROMPTS), expected, rtol=0, atol=1e-4)


def test_a_model_without_a_bias_is_not_a_siglip() -> None:
    with pytest.raises(ValueError, match="has no logit_bias: it is not a SigLIP model; use clip_score"):
        SiglipScore(str(tiny_clip())).load_weights()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"output": "probability"}, ValueError, "probability.*log_prob"),
        ({"model": "ViT-B-16-SigLip"}, ValueError, "open_clip has no architecture.*mean 'ViT-B-16-SigLIP'"),
        ({"model": "ViT-B-16-SigLIP"}, ValueError, r"needs `weights`: .*webli"),
        ({"model": "ViT-B-16-SigLIP", "weights": "no/such.pt"}, FileNotFoundError, "file at no/such.pt"),
        ({"model": "/no/folder/at/all"}, FileNotFoundError, "neither a folder"),
        ({"model": "CLIP"}, ValueError, r"of type 'clip', wanted is one of \('siglip', 'siglip2'\)"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"dtype": "int4"}, ValueError, "int4"),
        ({"scale": 0.0}, ValueError, r"scale is 0\.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_loads(change: Any, error: Any, message: str) -> None:
    if change.get("model") == "CLIP":  # written here: all processes of a run must name their tests alike
        change = {"model": str(transformers_clip())}
    component = {"component": "siglip_score", **published("siglip_score"), **change}
    with pytest.raises(error, match=message):
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(siglip("siglip2"), tmp_path / "model"))
    shutil.copy(siglip("siglip2") / "tokenizer.json", copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{i}": 40 + i for i in range(60)}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"has 40 tokens .*'word20', number 60.* 60 rows of .*: they are not of one model"
    ):
        SiglipScore(str(copy)).load_weights()


def test_a_missing_sentencepiece_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    reward = a_reward("siglip")  # its tokenizer is made with the package that is missing from here on
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for name in ("is_sentencepiece_available", "is_protobuf_available"):
        getattr(import_utils, name).cache_clear()
        monkeypatch.setattr(import_utils, f"_{name}", False, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-rtb\[siglip\]'"):
        reward.load_weights()
