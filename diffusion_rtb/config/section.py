"""What all sections of a config share, and nested mappings by dotted keys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "at_home", "leaves"]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversion, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a mapping inside that is empty is a value."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def at_home(value: Any) -> Any:
    """The same with `~/` and `~name/` at the beginning of its strings as the folder they mean, in lists and mappings too."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or (value.startswith("~") and "/" in value) else value
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    return value
