"""Texts of others are shown as text: no markup, no control characters, and no layout that a long word can hold up."""

from __future__ import annotations

import random
import time
import unicodedata
from collections.abc import Callable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import ImageFont
from rich.console import Console

from diffusion_rtb.config.yaml_text import read_yaml, write_yaml
from diffusion_rtb.files.pictures import LINES, _fitting, _Layout
from diffusion_rtb.files.plain_text import markdown_code, markdown_fence, markdown_text, plain, plain_lines
from diffusion_rtb.files.terminal import shown

HARMFUL = ["\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x7f", "\u2028", "\ud800"]


@pytest.mark.parametrize("character", HARMFUL)
def test_control_characters_are_escaped(character: str) -> None:
    text = plain(f"a{character}b")
    assert text.isascii()
    assert text.encode().decode("unicode_escape") == f"a{character}b"


@pytest.mark.parametrize(
    "text", ["", "a cat", "日本語の猫\u3000です", "👩‍👩‍👧 family", "naïve", "क्‍ष", "a [red] | `cat`"]
)
def test_everything_else_is_left_alone(text: str) -> None:
    assert plain(text) == text


@given(st.text())
def test_what_is_shown_can_be_sent_to_a_terminal(text: str) -> None:
    for found in (plain(text), plain_lines(text).replace("\n", "").replace("\t", "")):
        assert not {unicodedata.category(c) for c in found} & {"Cc", "Cs", "Zl", "Zp"}
        found.encode()


def test_long_texts_are_cut() -> None:
    assert plain("x" * 300, 10) == "x" * 9 + "…"
    assert plain("x" * 10, 10) == "x" * 10


@given(st.text(alphabet=st.sampled_from("[]/\\redbold :smile:#a\n")))
def test_a_terminal_shows_the_text_itself(text: str) -> None:
    console = Console(width=10_000)
    with console.capture() as captured:
        console.print(shown(text))
    assert captured.get().removesuffix("\n") == plain(text)


MARKDOWN = st.text(alphabet=st.sampled_from("`*_<>|[]()!&~$#\\ab \n1.-+=:/"))


def visible(markdown: str) -> str:
    """The text that a reader of the Markdown sees, by an independent parser, without tables."""
    tokens = MarkdownIt("commonmark", {"html": True}).parseInline(markdown)[0].children or []
    assert {token.type for token in tokens} <= {"text", "text_special", "code_inline"}, markdown
    return "".join(token.content for token in tokens)


@given(MARKDOWN)
def test_markdown_text_reads_as_the_text(text: str) -> None:
    assert visible(f"x{markdown_text(text)}x") == f"x{plain(text)}x"


@given(MARKDOWN)
def test_markdown_code_reads_as_the_text(text: str) -> None:
    assert visible(f"x {markdown_code(text)} x").strip("x ") == plain(text).strip("x ")


@given(st.text(alphabet=st.sampled_from("`\n a")))
def test_a_fence_holds_whatever_is_in_it(text: str) -> None:
    fence = markdown_fence(text)
    tokens = MarkdownIt().parse(f"{fence}\n{text}\n{fence}\n\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == f"{text}\n"


@given(st.text())
def test_yaml_shows_nothing_that_a_terminal_obeys(text: str) -> None:
    written = write_yaml({"prompts": {"list": [text]}})
    assert not {unicodedata.category(c) for c in written.replace("\n", "")} & {"Cc", "Cf", "Zl", "Zp"}
    assert yaml.safe_load(written) == read_yaml(written) == {"prompts": {"list": [text]}}


def lengthy(name: str) -> str:
    kinds: dict[str, Callable[[random.Random], str]] = {
        "word": lambda r: "x",
        "base64": lambda r: r.choice("ABCDEFGHIJKLMNOPabcdefghijklmnop0123456789+/"),
        "chinese": lambda r: chr(r.randrange(0x4E00, 0x9FFF)),
        "japanese": lambda r: chr(r.randrange(0x3041, 0x3096)),
        "combining": lambda r: "e\u0301",
        "words": lambda r: r.choice(["a ", "word ", "another "]),
        "controls": lambda r: "\x1b",
    }
    source = random.Random(0)
    return "".join(kinds[name](source) for _ in range(20_000))


@pytest.mark.parametrize("name", ["word", "base64", "chinese", "japanese", "combining", "words", "controls"])
def test_long_texts_take_no_time_to_lay_out(name: str) -> None:
    font, start = ImageFont.load_default(16), time.process_time()
    lines = _Layout.wrapped(lengthy(name), font, 500)
    assert time.process_time() - start < 1
    assert len(lines) == LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 500 for line in lines)


@given(st.text(alphabet="ilWm漢 é\u0301", max_size=60), st.integers(5, 300))
def test_bisection_finds_what_fits(text: str, width: int) -> None:
    """The longest beginning, by trying them all, as far as lengths grow with letters."""
    font = ImageFont.load_default(12)
    lengths = [font.getlength(text[:n]) for n in range(len(text) + 1)]
    fits = _fitting(text, font, width)
    assert lengths[fits] <= width
    if lengths == sorted(lengths):
        assert fits == max(n for n, length in enumerate(lengths) if length <= width)
