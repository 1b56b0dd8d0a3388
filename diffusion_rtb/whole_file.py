"""Files that appear whole or not at all: written beside their place under a hidden name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["whole", "write_json", "write_text"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`; nothing is left of it after an error."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write strict JSON, which has no NaN.

    Raises:
        ValueError: the content holds one.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")
