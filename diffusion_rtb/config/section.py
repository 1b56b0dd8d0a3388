"""What all sections of a config share."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "at_home"]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversion, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def at_home(value: Any) -> Any:
    """The same with `~/` and `~name/` at the beginning of its strings as the folder they mean, in lists and mappings too."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or (value.startswith("~") and "/" in value) else value
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    return value
