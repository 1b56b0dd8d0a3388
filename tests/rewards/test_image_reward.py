"""ImageReward equals BLIP and BERT of transformers with the same weights, from a file in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.config.components import build, check_component
from rewards._models.blip import BlipReward, BlipSizes
from rewards._models.linear_head import LinearHead
from rewards.image_reward import MEAN, STD, ImageReward
from tests.oracles.published_pixels import PROMPTS, check_gradient, cropped
from tests.oracles.published_weights import (
    BERT,
    VIT,
    bert_tokenizer,
    hub_cache,
    image_reward,
    image_reward_state,
    published,
)
from tests.oracles.tiny_rewards import some_images

SIDE = VIT["patch"] * VIT["grid"]

VISION_NAMES = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection.",
}  # fmt: skip


def a_reward(**settings: Any) -> ImageReward:
    return ImageReward(**published("image_reward"), **settings)


def blip(sizes: dict[str, int]) -> tuple[Any, Any]:
    """BLIP's two networks, of transformers."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        hidden_size=sizes["width"], intermediate_size=sizes["hidden"], num_hidden_layers=sizes["depth"],
        num_attention_heads=16, image_size=sizes["image"], patch_size=sizes["patch"], layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["text_width"], encoder_hidden_size=sizes["width"],
        intermediate_size=sizes["text_hidden"], num_hidden_layers=sizes["text_depth"], num_attention_heads=12,
        max_position_embeddings=sizes["positions"], is_decoder=True, bos_token_id=2, sep_token_id=3, eos_token_id=3,
    )  # fmt: skip
    return BlipVisionModel(vision).eval(), BlipTextModel(text, add_pooling_layer=False).eval()


@lru_cache
def by_transformers() -> tuple[Any, Any, Any]:
    """Networks of transformers with the published weights, and its tokenizer."""
    from transformers import BertTokenizer

    state = image_reward_state()
    words, hidden = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    vision, text = blip(
        {
            **VIT, "image": SIDE, "vocabulary": words, "text_width": hidden, "text_hidden": BERT["hidden"],
            "text_depth": BERT["depth"], "positions": BERT["positions"],
        }
    )  # fmt: skip
    seen = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items() if "visual_encoder" in k}
    for ours, theirs in VISION_NAMES.items():
        seen = {k.replace(ours, theirs): v for k, v in seen.items()}
    seen = {("post_layer" + k if k.startswith("norm.") else k): v for k, v in seen.items()}
    vision.load_state_dict(seen)
    read = {k.removeprefix("blip.text_encoder."): v for k, v in state.items() if "text_encoder" in k}
    loaded = text.load_state_dict(read, strict=False)
    assert not loaded.missing_keys
    assert set(loaded.unexpected_keys) <= {"embeddings.position_ids"}
    return vision, text, BertTokenizer.from_pretrained(bert_tokenizer())


def oracle(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score of normalised images, as the published code computes it."""
    vision, text, tokenizer = by_transformers()
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    image = vision(pixels).last_hidden_state
    features = text(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long), is_decoder=False,
    ).last_hidden_state[:, 0]  # fmt: skip
    state = image_reward_state()
    for place in (0, 2, 4, 6, 7):
        features = features @ state[f"mlp.layers.{place}.weight"].T + state[f"mlp.layers.{place}.bias"]
    return (features[:, 0] - MEAN) / STD


@pytest.mark.parametrize("height, width", [(SIDE, SIDE), (64, 64), (48, 40), (37, 90)])
def test_it_is_blip_and_bert_of_transformers(height: int, width: int) -> None:
    images = some_images(5, height, width)
    prompts = [*PROMPTS[:3], "a cat, " * 30, ""]
    with torch.no_grad():
        expected = oracle(cropped(images, SIDE), prompts)
    assert expected.std() > 1
    torch.testing.assert_close(a_reward(batch=2)(images, prompts), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a_reward(scale=-0.5)(images, prompts), -0.5 * expected, rtol=1e-4, atol=1e-4)


def test_the_prompt_and_its_order_matter() -> None:
    images = some_images(1, SIDE, SIDE).expand(3, -1, -1, -1)
    values = a_reward()(images, ["a blue cat", "a cat blue", "a dog"])
    assert len({round(value, 3) for value in values.tolist()}) == 3


def test_gradient() -> None:
    check_gradient(a_reward(grad=True), oracle, SIDE)


def test_the_defaults_are_the_published_sizes() -> None:
    sizes = BlipSizes()
    with torch.device("meta"):
        ours: nn.Module = BlipReward(sizes, LinearHead((768, 1024, 128, 64, 16, 1)))
        vision, text = blip(vars(sizes))
    count = sum(parameter.numel() for parameter in ours.parameters())
    head = (768 + 1) * 1024 + (1024 + 1) * 128 + (128 + 1) * 64 + (64 + 1) * 16 + 17
    assert count == sum(p.numel() for network in (vision, text) for p in network.parameters()) + head
    # ViT-L/16 at 224 pixels without its classifier: 303.3 million (Dosovitskiy et al., 2020).
    assert sum(p.numel() for p in vision.parameters()) == 303_301_632
    names = ours.state_dict().keys()
    assert "blip.visual_encoder.blocks.23.attn.qkv.weight" in names
    assert "blip.text_encoder.encoder.layer.11.crossattention.output.LayerNorm.bias" in names
    assert "mlp.layers.7.bias" in names
    assert names >= {k for k in image_reward_state() if "_proj." not in k and "position_ids" not in k}


def test_blip_s_own_tokens_come_last() -> None:
    reward = a_reward()
    tokens, mask = reward._tokens(["a [ENC] cat [DEC]", "a cat"])
    rows = len(image_reward_state()["blip.text_encoder.embeddings.word_embeddings.weight"])
    assert tokens.shape == mask.shape == (2, 35)
    assert {rows - 1, rows - 2} <= set(tokens[0].tolist())
    assert mask.sum(1).tolist() == [6, 4]
    assert rows - 2 == reward.tokenizer.convert_tokens_to_ids("[DEC]")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: Any) -> None:
    images = some_images(5, 48, 40)
    exact, half = a_reward()(images, PROMPTS), a_reward(dtype=dtype)(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.5 if dtype == "bfloat16" else 0.1)
    assert not torch.equal(half, exact)


def test_a_file_on_the_hub_is_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, "THUDM/ImageReward", {"ImageReward.pt": image_reward()}, monkeypatch)
    images = some_images(2, SIDE, SIDE)
    reward = build({"component": "image_reward", "tokenizer": str(bert_tokenizer())}, "reward")
    assert torch.equal(reward(images, PROMPTS[:2]), a_reward()(images, PROMPTS[:2]))
    with pytest.raises(FileNotFoundError, match=r"ImageReward/other\.pt cannot be fetched: .*give its path"):
        ImageReward("hf-hub:THUDM/ImageReward/other.pt", str(bert_tokenizer()))
    with pytest.raises(ValueError, match=r"The tokenizer 'bert-base-uncased' .* give a folder with its vocab\.txt"):
        ImageReward(str(image_reward()))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weights": "none.pt"}, FileNotFoundError, r"No weights file at none\.pt"),
        ({"weights": "hf-hub:THUDM/ImageReward"}, ValueError, "write hf-hub:OWNER/NAME/FILE"),
        ({"tokenizer": "./nowhere"}, FileNotFoundError, "neither a folder nor a hub id"),
        ({"tokenizer": str(Path(__file__).parent)}, FileNotFoundError, r"it has no vocab\.txt"),
        ({"batch": 0}, ValueError, "batch is 0: at least 1"),
        ({"dtype": "int8"}, ValueError, "int8"),
        ({"scale": 0.0}, ValueError, r"scale is 0\.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_loads(change: Any, error: Any, message: str) -> None:
    component = {"component": "image_reward", **published("image_reward"), **change}
    with pytest.raises(error, match=message):
        check_component(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def saved(state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(bert_tokenizer())}


def test_other_weights_are_refused(tmp_path: Path) -> None:
    state = image_reward_state()
    lacking = {k: v for k, v in state.items() if k != "blip.text_encoder.encoder.layer.1.output.dense.bias"}
    with pytest.raises(ValueError, match=r"weights of ImageReward: 1 missing \(first: .*layer\.1\.output\.dense\.bias"):
        ImageReward(**saved(lacking, tmp_path))
    with pytest.raises(ValueError, match=r"layout of ImageReward\.pt: it has no 'blip\.visual_encoder\.patch"):
        ImageReward(**saved({k.removeprefix("blip."): v for k, v in state.items()}, tmp_path))
    with pytest.raises(ValueError, match=r"holds no head of 5 linear layers .* mlp\.layers"):
        ImageReward(**saved({k: v for k, v in state.items() if k != "mlp.layers.4.weight"}, tmp_path))
    narrow = {**state, "blip.visual_encoder.patch_embed.proj.weight": torch.zeros(30, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"width 30 for images .* multiples of ImageReward's 16 and 12 heads"):
        ImageReward(**saved(narrow, tmp_path))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ncat\n")
    with pytest.raises(ValueError, match=r"has 9 tokens with \[DEC\] and \[ENC\], the weights embed .* give a folder"):
        ImageReward(str(image_reward()), str(tmp_path))
