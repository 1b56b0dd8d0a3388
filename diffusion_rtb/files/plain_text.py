r"""What others wrote (prompts, names, paths, messages) as people can safely read it: text, never markup.

A prompt may hold `[/red]`, which a terminal library takes for a tag, `|` and `<img>`, which Markdown does, or an escape sequence
that renames the terminal's window. Whatever is shown passes through here first; files for programs keep the text as it is.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["markdown_code", "markdown_fence", "markdown_text", "plain", "plain_lines"]

JOINERS = "\u200c\u200d"
"""Of letters and emoji: they change nothing but the shape."""

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Control and format characters (they also turn the direction of writing), halves of surrogate pairs, line separators."""

_ODD, _ODD_IN_LINES = re.compile(r"[^ -~]"), re.compile(r"[^ -~\n\t]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: object, limit: int | None = None) -> str:
    r"""The text on one line, with `\x1b` for an escape character, `\n` for a new line, and so on.

    Args:
        text: Anything with a text.
        limit: Characters at most; what is beyond them becomes an ellipsis. None: all of it.
    """
    whole = str(text)
    cut = whole if limit is None or len(whole) <= limit else f"{whole[: limit - 1]}…"
    return _ODD.sub(_visible, cut)


def plain_lines(text: object) -> str:
    """The same for a message of several lines: it keeps its line ends and tabs."""
    return _ODD_IN_LINES.sub(_visible, str(text))


def markdown_text(text: object) -> str:
    """The text between other Markdown, also in a cell of a table: nothing in it is markup, HTML or mathematics."""
    return _MARKDOWN.sub(r"\\\g<0>", plain(text))


def markdown_code(text: object) -> str:
    """The text as inline code; for a cell of a table its bars are escaped besides."""
    shown = plain(text)
    fence = "`" * (_longest_run(shown) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def markdown_fence(text: str) -> str:
    """Backticks that open and close a block of code around the text, whatever is in it."""
    return "`" * max(3, _longest_run(text) + 1)


def _visible(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable() or character in JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
