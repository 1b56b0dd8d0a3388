"""The prompts of a run and what is known about each of them, as one table with one hash."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

__all__ = ["HALVES", "Metadata", "PromptTable", "Row", "check_prompt", "checked_prompts", "merged_table"]

Metadata = Mapping[str, Any]
"""What a prompt's row says besides the prompt; JSON values, empty where there is nothing."""

HALVES = re.compile("[\ud800-\udfff]")
"""Of a surrogate pair; UTF-8 has no bytes for them."""

Row = tuple[int, str, Metadata]
"""Line of the file, prompt, metadata."""


@dataclass(frozen=True)
class PromptTable:
    """Different prompts, each with its metadata; a *row* is an index into both."""

    texts: tuple[str, ...]
    metadata: tuple[Metadata, ...]
    merged: int = field(default=0, compare=False)
    """Lines of the file that said again what an earlier one had said."""

    @staticmethod
    def of(texts: Sequence[str]) -> PromptTable:
        """Prompts of which nothing more is known."""
        return PromptTable(tuple(texts), ({},) * len(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, texts: Sequence[str]) -> PromptTable:
        """With further prompts, of which nothing more is known."""
        return PromptTable((*self.texts, *texts), (*self.metadata, *({} for _ in texts)))

    @cached_property
    def lines(self) -> str:
        """The table as JSON lines, one way of writing it for one content."""
        return "".join(f"{_line(*row)}\n" for row in zip(self.texts, self.metadata, strict=True))

    @cached_property
    def sha256(self) -> str:
        """The hash of `lines` in UTF-8."""
        return sha256(self.lines.encode()).hexdigest()

    def difference(self, other: PromptTable) -> str:
        """Where this table first says something else than the other, in words."""
        pairs = zip(self.texts, other.texts, strict=False)
        row = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self), len(other)))
        if self.texts == other.texts:
            row = next(i for i, (a, b) in enumerate(zip(self.metadata, other.metadata, strict=True)) if a != b)
            return f"{len(self)} prompts, metadata of no. {row + 1} {dict(self.metadata[row])}"
        return f"{len(self)} prompts, no. {row + 1} " + (repr(self.texts[row]) if row < len(self) else "missing")


def _line(text: str, metadata: Metadata) -> str:
    rest = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
    start = f'{{"prompt": {json.dumps(text, ensure_ascii=False)}'
    return f"{start}, {rest[1:]}" if metadata else f"{start}}}"


def merged_table(rows: Iterable[Row], source: object) -> PromptTable:
    """The table of a file's rows; what is said twice counts once.

    Args:
        rows: In the order of the file.
        source: What errors call it.

    Raises:
        ValueError: no rows; one prompt with different metadata; a prompt that is no text.
    """
    kept: dict[str, tuple[int, Metadata]] = {}
    merged = 0
    for number, text, metadata in rows:
        check_prompt(text, f"{source}, line {number}")
        if metadata:
            check_prompt(_line("", metadata), f"{source}, line {number}")
        line, before = kept.setdefault(text, (number, metadata))
        if line != number and _line(text, before) != _line(text, metadata):
            raise ValueError(
                f"{source}: lines {line} and {number} give the prompt {text!r} different metadata, {dict(before)} and "
                f"{dict(metadata)}. Trajectories are grouped by prompt: delete one of the lines, or make the prompts differ."
            )
        merged += line != number
    if not kept:
        raise ValueError(
            f"{source} has no prompts. Write one per line; empty lines and lines starting with '# ' do not count."
        )
    return PromptTable(tuple(kept), tuple(metadata for _, metadata in kept.values()), merged)


def checked_prompts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """These prompts, as they are. ValueError: one of them is there twice, or is no text."""
    twice = next((text for text, count in Counter(texts).items() if count > 1), None)
    if twice is not None:
        raise ValueError(
            f"the prompt {twice!r} is given more than once: trajectories are grouped by prompt, name each once"
        )
    for number, text in enumerate(texts, 1):
        check_prompt(text, f"prompt {number}")
    return texts


def check_prompt(text: str, where: str) -> None:
    """Refuse what no tokenizer, file or request can carry; ValueError."""
    if "\0" in text:
        raise ValueError(f"{where}: {text[:60]!r} holds a NUL character, which is no text; take it out")
    if HALVES.search(text):
        raise ValueError(
            f"{where}: {text[:60]!r} holds half a surrogate pair, which is no text; write the whole letter"
        )
