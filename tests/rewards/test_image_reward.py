"""ImageReward from a file in the published layout: its numbers, its gradient, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from rewards.image_reward import MEAN, STD, ImageReward
from tests.oracles.published_pixels import PROMPTS, check_gradient, cropped
from tests.oracles.published_weights import (
    VIT,
    bert_tokenizer,
    hub_cache,
    image_reward,
    image_reward_state,
    published,
)
from tests.oracles.tiny_rewards import some_images

SIDE = VIT["patch"] * VIT["grid"]


def a_reward(**settings: Any) -> ImageReward:
    return ImageReward(**published("image_reward"), **settings)


def oracle(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score of normalised images: what is left without resizing, cropping and rounding."""
    reward = a_reward()
    return (reward.network(pixels, *reward._tokens(prompts)) - MEAN) / STD


GOLDEN = {
    (32, 32): [0.273056, 11.125098, 0.200202, 5.250583, 5.597332],
    (64, 64): [0.256222, 11.012145, 0.247815, 5.236348, 5.323891],
    (48, 40): [5.543562, 8.981951, 4.356336, 5.684982, 1.501707],
    (37, 90): [5.571878, -0.176364, 2.281949, 4.369844, 2.764508],
}
"""Height, width -> what another implementation, BLIP and BERT written out in torch, gives with the same weights."""


@pytest.mark.parametrize("height, width", GOLDEN)
def test_it_has_the_numbers_of_another_implementation(height: int, width: int) -> None:
    images, prompts = some_images(5, height, width), [*PROMPTS[:3], "a cat, " * 30, ""]
    expected = torch.tensor(GOLDEN[height, width])
    torch.testing.assert_close(a_reward(batch=2)(images, prompts), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a_reward(scale=-0.5)(images, prompts), -0.5 * expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(oracle(cropped(images, SIDE), prompts), expected, rtol=1e-4, atol=1e-4)


def test_the_prompt_and_its_order_matter() -> None:
    images = some_images(1, SIDE, SIDE).expand(3, -1, -1, -1)
    values = a_reward()(images, ["a blue cat", "a cat blue", "a dog"])
    assert len({round(value, 3) for value in values.tolist()}) == 3


def test_gradient() -> None:
    check_gradient(a_reward(grad=True), oracle, SIDE)


def test_its_tensors_have_the_published_names() -> None:
    names = a_reward().network.state_dict().keys()
    assert names == {k for k in image_reward_state() if "_proj." not in k and "position_ids" not in k}


def test_blip_s_own_tokens_come_last() -> None:
    reward = a_reward()
    reward.load_weights()
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
        ImageReward("hf-hub:THUDM/ImageReward/other.pt", str(bert_tokenizer())).load_weights()
    with pytest.raises(ValueError, match=r"The tokenizer 'bert-base-uncased' .* give a folder with its vocab\.txt"):
        ImageReward(str(image_reward())).load_weights()


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
        describe(component, "reward")
    with pytest.raises(error, match=message):
        build(component, "reward")


def saved(state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(bert_tokenizer())}


def test_other_weights_are_refused(tmp_path: Path) -> None:
    state = image_reward_state()
    lacking = {k: v for k, v in state.items() if k != "blip.text_encoder.encoder.layer.1.output.dense.bias"}
    with pytest.raises(ValueError, match=r"weights of ImageReward: 1 missing \(first: .*layer\.1\.output\.dense\.bias"):
        ImageReward(**saved(lacking, tmp_path)).load_weights()
    with pytest.raises(ValueError, match=r"layout of ImageReward\.pt: it has no 'blip\.visual_encoder\.patch"):
        ImageReward(**saved({k.removeprefix("blip."): v for k, v in state.items()}, tmp_path)).load_weights()
    with pytest.raises(ValueError, match=r"holds no head of 5 linear layers .* mlp\.layers"):
        ImageReward(**saved({k: v for k, v in state.items() if k != "mlp.layers.4.weight"}, tmp_path)).load_weights()
    narrow = {**state, "blip.visual_encoder.patch_embed.proj.weight": torch.zeros(30, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"width 30 for images .* multiples of ImageReward's 16 and 12 heads"):
        ImageReward(**saved(narrow, tmp_path)).load_weights()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ncat\n")
    with pytest.raises(ValueError, match=r"has 9 tokens with \[DEC\] and \[ENC\], the weights embed .* give a folder"):
        ImageReward(str(image_reward()), str(tmp_path)).load_weights()
