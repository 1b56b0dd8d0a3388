"""What was found, as a page of text: a verdict, the examination, what it found; the same piped, without colours."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from diffusion_rtb.doctor.finding import Examined, Verdict
from diffusion_rtb.files.plain_text import plain, plain_lines

__all__ = ["show_examined", "show_sentence"]

STYLES: Mapping[Verdict, str] = {"ok": "green", "look": "yellow", "stop": "bold red"}

VERDICT, NAME, LABEL = 5, 11, 21
"""Columns of a verdict, of an examination's name, of a row's label."""

WIDEST = 100
"""Columns of the page at most; lines any longer are hard to read."""


def show_examined(name: str, found: Examined, console: Console) -> None:
    """Print what one examination found: a sentence each with its verdict, a remedy below it, then the rows of its table."""
    width, indent = min(console.width, WIDEST), VERDICT + NAME
    for place, finding in enumerate(found.findings):
        style = STYLES[finding.verdict]
        said = [Text(line) for line in _wrapped(finding.text, width - indent)]
        said += [Text(line, style=style) for line in _wrapped(finding.remedy, width - indent, "-> ")]
        first = Text.assemble((finding.verdict.ljust(VERDICT), style), ("" if place else name).ljust(NAME))
        for start, line in zip([first, *[Text(" " * indent)] * len(said)], said, strict=False):
            console.print(start + line, soft_wrap=True)
    for label, value in found.rows:
        begin = Text.assemble(" " * indent, (plain(label).ljust(LABEL), "dim"))
        for number, part in enumerate(_wrapped(value, width - indent - LABEL)):
            console.print((Text(" " * (indent + LABEL)) if number else begin) + Text(part), soft_wrap=True)


def show_sentence(sentence: str, verdict: Verdict, console: Console) -> None:
    """Print the conclusion."""
    console.print()
    for line in _wrapped(sentence, min(console.width, WIDEST)):
        console.print(Text(line, style=STYLES[verdict]), soft_wrap=True)


def _wrapped(text: str, width: int, mark: str = "") -> Iterator[str]:
    """The lines of a text; names and numbers are kept whole, and a word longer than a line is on its own."""
    for line in plain_lines(text).splitlines():
        yield from textwrap.wrap(
            f"{mark}{line}",
            max(width, 20),
            subsequent_indent=" " * len(mark),
            break_long_words=False,
            break_on_hyphens=False,
        )
