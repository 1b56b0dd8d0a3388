"""What a sweep varies: keys with their values, and the points that they make, in increasing order.

An argument `KEY=V1,V2,…` whose value has commas outside brackets and quotes is an axis; any other one is an override of all points.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.config.yaml_text import read_yaml

__all__ = ["Axis", "Point", "configured", "points", "read_axes"]

TARGET = ("beta", "reward")
"""Sections that move the target alone: along these one posterior is a start for the next."""

INCOMPARABLE = ("reward", "prior", "prompts", "eval")
"""Sections that change what a reward, a KL or a diversity means: points that differ in them are no trade-off."""


@dataclass(frozen=True)
class Axis:
    """A key and its values, ascending if they are numbers, else as they were given."""

    key: str
    texts: tuple[str, ...]
    """As they were written."""
    values: tuple[Any, ...]

    @property
    def section(self) -> str:
        """The first part of the key."""
        return self.key.partition(".")[0]

    @property
    def moves_target(self) -> bool:
        """Its values are numbers that make the target harder and harder, and nothing else."""
        return self.section in TARGET and all(_number(value) for value in self.values)

    @property
    def comparable(self) -> bool:
        """Whether rewards, KL and diversity of its points are in the same units, of the same things."""
        return self.section not in INCOMPARABLE


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: tuple[tuple[str, Any], ...]
    """Key and value of each axis."""
    overrides: tuple[str, ...]
    label: str
    """What its folder's name ends with: beta-0.5."""
    before: int | None = None
    """The place of the point that it may start from: the next smaller one along an axis that moves the target alone."""


def read_axes(arguments: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes among the arguments of a command, and the overrides.

    Raises:
        ConfigError: there is no axis, a value is missing, not YAML or given twice, or a key is.
    """
    axes: list[Axis] = []
    overrides = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        parts = [part.strip() for part in _parted(text)]
        if not equals or len(parts) < 2:
            overrides.append(argument)
            continue
        axes.append(_axis(key.strip(), parts))
    if not axes:
        raise ConfigError(
            f"A sweep needs a key with several values, e.g. beta=0.5,1,2,4; got {' '.join(arguments) or 'none'}. One value "
            "is a run: `diffusion-rtb train`."
        )
    keys = [axis.key for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None) or next(
        (key for key in keys if any(override.partition("=")[0].strip() == key for override in overrides)), None
    )
    if twice is not None:
        raise ConfigError(f"The key {twice!r} is given twice: write all its values into one argument, {twice}=A,B,C.")
    return axes, overrides


def _axis(key: str, parts: Sequence[str]) -> Axis:
    where = f"{key}={','.join(parts)}"
    if "" in parts:
        raise ConfigError(f"{where}: a value is missing beside a comma.")
    try:
        values = [read_yaml(part) for part in parts]
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: a value is not YAML ({error}). Quote it?") from None
    for i, value in enumerate(values):
        if value in values[:i]:
            first = parts[values.index(value)]
            raise ConfigError(f"{where}: {first} and {parts[i]} are the same value; a sweep has each point once.")
    order = sorted(range(len(parts)), key=lambda i: values[i]) if all(map(_number, values)) else range(len(parts))
    return Axis(key, tuple(parts[i] for i in order), tuple(values[i] for i in order))


def _parted(text: str) -> Iterator[str]:
    """The text at its commas, not those in brackets and quotes."""
    depth, quote, part = 0, "", ""
    for letter in text:
        if letter == "," and depth <= 0 and not quote:
            yield part
            part = ""
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not part.strip(" [{,"):
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        part += letter
    yield part


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def points(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the axes' values, the last axis fastest."""
    places = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    along = next((i for i, axis in enumerate(axes) if axis.moves_target), None)
    names = [_short_key(axis.key, axes) for axis in axes]
    found = []
    for place in places:
        values = tuple((axis.key, axis.values[k]) for axis, k in zip(axes, place, strict=True))
        texts = [axis.texts[k] for axis, k in zip(axes, place, strict=True)]
        label = "-".join(f"{name}-{_slug(text, k)}" for name, text, k in zip(names, texts, place, strict=True))
        before = None
        if along is not None and place[along] > 0:
            before = places.index((*place[:along], place[along] - 1, *place[along + 1 :]))
        overrides = tuple(f"{axis.key}={text}" for axis, text in zip(axes, texts, strict=True))
        found.append(Point(values, overrides, label, before))
    labels = [point.label for point in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"Two points would both be called {twice!r}: write their values so that they differ.")
    return found


def _short_key(key: str, axes: Sequence[Axis]) -> str:
    """The last part of a key, as long as no other axis ends with it."""
    last = key.rpartition(".")[2]
    return last if sum(axis.key.rpartition(".")[2] == last for axis in axes) == 1 else key


def _slug(text: str, place: int) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or str(place + 1)


def configured(config: Path, point: Point, overrides: Sequence[str], base: RunConfig) -> RunConfig:
    """The config of a point: OUT/NAME-LABEL.

    Raises:
        ConfigError: the key does not exist, or its value is impossible; it is said of which point.
    """
    name = f"{base.name}-{point.label}"
    return load_config(config, [*overrides, *point.overrides, f"name={json.dumps(name)}"])
