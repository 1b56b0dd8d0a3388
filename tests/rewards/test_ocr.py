"""The text in the prompt's quotes against text that was really drawn and really read."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from rewards.ocr import Ocr, edit_distance, plain, quoted, score
from tests.oracles.reward_contract import keeps_contract

reads = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="needs the extra: pip install -e '.[ocr]'"
)


def sign(*lines: str, side: int = 128, ink: str = "black", paper: str = "white") -> Tensor:
    """Words in the middle of a square image, each line as wide as fits."""
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        font = ImageFont.load_default(size=min(1.5 * side / len(line), 0.6 * side / len(lines)))
        draw.text((side / 2, side * (2 * i + 1) / (2 * len(lines))), line, ink, font, anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@lru_cache
def reader(**arguments: Any) -> Ocr:
    """One for all tests: loading its networks takes longer than reading."""
    found: Ocr = build({"component": "ocr", **arguments}, "reward")
    return found


@reads
@pytest.mark.parametrize("side", [64, 128])
def test_what_is_written_is_read(side: int) -> None:
    words = ["HELLO", "diffusion", "RTB", "Coffee", "exit 7", "open late"]
    images = torch.stack([sign(word, side=side) for word in words])
    assert reader().read(images) == [plain(word) for word in words]
    prompts = [f'a poster that says "{word}"' for word in words]
    assert reader()(images, prompts).tolist() == [1.0] * len(words)
    assert (reader()(images, [*prompts[1:], prompts[0]]) < 0.7).all(), "each against another's word"


@reads
def test_a_broken_image_has_no_reward() -> None:
    images = torch.stack([sign("HELLO"), sign("HELLO")])
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(RewardError, match="is nan for image 1"):
        evaluate_reward(reader(), images, ['says "hello"'] * 2, "ocr")


@reads
def test_every_wrong_letter_costs_its_share() -> None:
    image = sign("HELLO")[None].expand(5, -1, -1, -1)
    prompts = [f'says "{text}"' for text in ("hello", "HELLA", "yellow", "hell", "12345")]
    # Substitution; two letters of six; a part of what is there is all of what was wanted; nothing.
    assert reader()(image, prompts).tolist() == pytest.approx([1, 4 / 5, 4 / 6, 1, 0])
    assert reader(extra="counted")(image, prompts).tolist() == pytest.approx([1, 4 / 5, 4 / 6, 3 / 4, 0])


@reads
def test_lines_are_read_from_top_to_bottom_and_colour_is_no_matter() -> None:
    image = sign("OPEN", "LATE", side=160, ink="gold", paper="navy")
    assert reader().read(image[None]) == ["openlate"]
    both = ["a neon sign “open” and „late“"]
    assert reader(quotations="all")(image[None], both).item() == reader()(image[None], both).item() == 1.0
    assert reader(quotations="all", extra="counted")(image[None], both).item() == 1.0
    assert reader(extra="counted")(image[None], both).item() == 0.0, "four letters of eight"


@reads
def test_without_text_there_is_no_reward_and_no_error() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), torch.rand(3, 64, 64)])
    assert reader()(images, ['"a"', '"b"', '"xyz"']).tolist() == [0.0] * 3


@reads
def test_one_text_for_all_prompts() -> None:
    images = torch.stack([sign("STOP"), sign("SHOP")])
    assert reader(text="Stop")(images, ["a street", "another street"]).tolist() == [1.0, 0.75]


@reads
def test_it_keeps_the_contract() -> None:
    images = torch.stack([sign(word, side=64) for word in ("HELLO", "WORLD", "STOP", "EXIT")])
    prompts = ['"HELLO"', '"HELLO"', '"STEP"', '"EXIT"']
    values = keeps_contract(reader(), images, prompts, "ocr")
    assert values.tolist() == pytest.approx([1, 0.2, 0.75, 1])


text = st.text("abcd", max_size=7)


def by_definition(one: str, other: str) -> int:
    """The recursion of the definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return by_definition(one[1:], other[1:])
    return 1 + min(by_definition(one[1:], other), by_definition(one, other[1:]), by_definition(one[1:], other[1:]))


@settings(deadline=None, max_examples=60)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_is_its_definition(one: str, other: str) -> None:
    assert edit_distance(one, other) == by_definition(one, other)


@settings(deadline=None)
@given(text, text, text)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_known_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "four") == 4


@pytest.mark.parametrize(
    "prompt, first, every",
    [
        ('a sign that says "Open Late"', "openlate", "openlate"),
        ('"one" above "two"', "one", "onetwo"),
        ('“one” beside "two"', "two", "onetwo"),
        ("a cake with “Happy Birthday”", "happybirthday", "happybirthday"),
        ("ein Schild: „Bäckerei“ und „Straße“", "bäckerei", "bäckereistrasse"),
        ("une affiche «Café»", "café", "café"),
        ("the cat's shop, \"Tom's\"", "tom's", "tom's"),
        ('full width "ＡＢＣ１"', "ａｂｃ１", "abc1"),
        ('a ligature "ﬁne 13⅓"', "ﬁne13⅓", "fine131⁄3"),
        ('tabs "a\tb c"', "a\tbc", "abc"),
    ],
)
def test_what_a_prompt_quotes(prompt: str, first: str, every: str) -> None:
    assert quoted(prompt) == first
    assert quoted(prompt, "all", "folded") == every


def published(prompt: str, recognised: str) -> float:
    """Flow-GRPO's reward of a recognised text, with the definition of the edit distance."""
    wanted = prompt.split('"')[1].replace(" ", "").lower()
    found = recognised.replace(" ", "").lower()
    distance = 0 if wanted in found else by_definition(found, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


@settings(deadline=None, max_examples=60)
@given(
    st.text("aAß ﬁ", min_size=1, max_size=4).filter(str.strip),
    st.text("b“ ", max_size=3),
    st.text("aAß ﬁb", max_size=5),
)
def test_the_defaults_are_the_published_formula(wanted: str, more: str, recognised: str) -> None:
    prompt = f'“b” {more} with "{wanted}" and "{more} b"'
    assert score(plain(recognised), quoted(prompt)) == published(prompt, recognised)


def test_known_differences_are_options() -> None:
    sharp = plain("fine strasse", "folded"), quoted('"ﬁne Straße"', "first", "folded")
    assert score(*sharp) == 1.0
    assert score(plain("fine strasse"), quoted('"ﬁne Straße"')) == pytest.approx(1 - 4 / 9)
    assert score("a", quoted('"A" then "B"')) == 1.0
    assert score("a", quoted('"A" then "B"', "all")) == 0.5


@reads
def test_a_line_counts_from_its_confidence_on() -> None:
    """The recogniser's own confidences, read without a threshold, are where the option cuts."""
    image = sign("HELLO")
    lines, _ = reader()._reader((255 * image).byte().permute(1, 2, 0).flip(2).contiguous().numpy())
    (sure,) = [confidence for _, _, confidence in lines]
    assert 0.5 < sure < 1
    assert reader(confidence=float(sure) - 1e-6).read(image[None]) == ["hello"]
    assert reader(confidence=float(sure)).read(image[None]) == [""]


@pytest.mark.parametrize("prompt", ["a cat", "the cat's whiskers", 'an empty "" sign', 'a " alone', '" "'])
def test_a_prompt_that_quotes_nothing(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"quotes no text: write it like .* or give the reward `text: open`"):
        quoted(prompt)


@reads
def test_such_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="Prompt 'a cat' quotes no text"):
        reader()(torch.zeros(2, 3, 64, 64), ['"HELLO"', "a cat"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": "  "}, "text is '  ': it has no letters"),
        ({"quotations": "last"}, "Input should be 'first' or 'all'|quotations is 'last': use 'first' or 'all'"),
        ({"letters": "upper"}, "Input should be 'lower' or 'folded'|letters is 'upper': use 'lower' or 'folded'"),
        ({"extra": "punished"}, "Input should be 'ignored' or 'counted'"),
        ({"side": 8}, "side is 8: use 32 to 4096"),
        ({"confidence": 1.0}, r"confidence is 1.0: it must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    for act in (describe, build):
        with pytest.raises(ValueError, match=message):
            act({"component": "ocr", **arguments}, "reward")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rapidocr_onnxruntime" else found(name)
    )
    with pytest.raises(ValueError, match=r"needs rapidocr-onnxruntime.*pip install 'diffusion-rtb\[ocr\]'"):
        describe({"component": "ocr"}, "reward")
