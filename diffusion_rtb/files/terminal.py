"""The terminal as a place for text: no markup, no guessed colours, no emoji codes, no control characters of others."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from diffusion_rtb.files.plain_text import plain, plain_lines

__all__ = ["console", "say", "shown"]


def console(*, stderr: bool = False) -> Console:
    """Where results go, or with `stderr` messages to people; what is printed there is taken as it is."""
    return Console(stderr=stderr, soft_wrap=stderr, markup=False, highlight=False, emoji=False)


def say(message: str, style: str = "") -> None:
    """One message to people, on the error stream: the output stream is for results."""
    console(stderr=True).print(Text(plain_lines(message), style=style))


def shown(text: object, limit: int | None = None, style: str = "") -> Text:
    """Text of others as a cell, title or line of one's own; see `plain`."""
    return Text(plain(text, limit), style=style)
