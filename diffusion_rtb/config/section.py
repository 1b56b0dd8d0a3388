"""What all sections of a config share, components among them, and nested mappings by dotted keys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["Component", "Named", "Section", "at_home", "judge_name", "leaves"]


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


class Component(BaseModel):
    """A prior, reward, objective, behaviour or metric by name, with the arguments of its constructor beside the name."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, use_attribute_docstrings=True)

    component: Annotated[str, Field(min_length=1)]
    """A file's name (clip_score), `module:attribute` (my_module:MyReward), or a registered entry point."""

    @model_validator(mode="before")
    @classmethod
    def _homes(cls, data: Any) -> Any:
        return at_home(data)


def judge_name(judge: Component) -> str:
    """What a judge is called in files and tables: its `name`, else its component."""
    return str((judge.model_extra or {}).get("name") or judge.component)


def _by_name(value: Any) -> Any:
    return {"component": value} if isinstance(value, str) else value


Named = Annotated[Component, BeforeValidator(_by_name, json_schema_input_type=str | Component)]
"""A component, or the name of one without arguments."""
