"""Numbers and components as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusion_rtb.config.load import Component
from diffusion_rtb.files.plain_text import plain

__all__ = ["arguments_text", "count_text", "many", "seconds_text"]


UNITS = (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600))
"""A unit, its seconds, the one below it, that one's seconds."""

LARGEST = {"min": 3599.5, "h": 86370.0}
"""Seconds from where on the next unit is used."""


def seconds_text(seconds: float) -> str:
    """A duration: "0.04 s", "3.3 s", "6 min 10 s", "2 h 5 min", "3 d 4 h"."""
    if round(seconds) < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    unit, size, part, smaller = next(names for names in UNITS if seconds < LARGEST.get(names[0], math.inf))
    whole, rest = divmod(round(seconds / smaller), size // smaller)
    return f"{whole} {unit} {rest} {part}" if rest else f"{whole} {unit}"


def count_text(count: int) -> str:
    """How many: "512", "1.6 M", "859.5 M", "12.0 G"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size and count >= 10**4:
            return f"{count / size:.1f} {unit}"
    return str(count)


def many(count: int, what: str) -> str:
    """So many of something: "1 prompt", "4 prompts", "3 micro-batches"."""
    ending = "" if count == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{count:,} {what}{ending}"


def arguments_text(component: Component | Mapping[str, Any], limit: int) -> str:
    """A component's arguments, in short: `path=emoji, timesteps=[11], guidance=1.0`."""
    held = dict(component.model_extra or {}) if isinstance(component, Component) else dict(component)
    return plain(", ".join(f"{key}={_value(value)}" for key, value in held.items() if value is not None), limit)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["component"]) if "component" in value else "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, list | tuple) and (
        len(value) > 4 or any(isinstance(item, list | tuple | Mapping) for item in value)
    ):
        return f"[{len(value)}]"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)
