"""Named objectives and behaviours, and the configs that they make of one.

A variant is a piece of a config under a name:

    objectives:
      trust_pcl_10: {objective: {component: trust_pcl, length: 10}, train: {lr_objective: 0.003}}
    behaviours:
      resampled: {behaviours: [{component: prior_buffer, share: 0.5, capacity: 4000}]}

Its `objective`, `behaviours` and every other section replace those of the config, so that nothing of the config's own behaviours is
left in another; of `train` and `posterior` it changes only the keys it has. Variants come from `variants.yaml` of this package, and
from FOLDER/compare/NAME.yaml for a config FOLDER/NAME.yaml, or a file that the command names. An objective goes by its own name
as well (`rtb`: with its defaults), and `config` is what the config says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.config.components import short_names
from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.config.yaml_text import read_yaml

__all__ = ["AS_CONFIGURED", "Cell", "Variants", "cells", "load_variants"]

Axis = Literal["objectives", "behaviours"]

AS_CONFIGURED = "config"
"""The variant that changes nothing."""

BUILT_IN = Path(__file__).with_name("variants.yaml")

FIXED = ("name", "seed", "out", "prior", "reward", "beta", "prompts", "eval")
"""Sections that all runs of a comparison share: with another target they could not be compared."""

MERGED = ("train", "posterior")
"""Sections of which a variant changes single keys."""


@dataclass(frozen=True)
class Variants:
    """Everything that has a name, by axis."""

    objectives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    behaviours: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def overrides(self, axis: Axis, name: str) -> list[str]:
        """What the variant changes, as `key.sub=value`.

        Raises:
            ConfigError: nothing has that name; the message says what is nearest and what there is.
        """
        known = dict(getattr(self, axis))
        if axis == "objectives":
            known = {short: {"objective": {"component": short}} for short in short_names("objective")} | known
        known[AS_CONFIGURED] = {}
        if name not in known:
            what = axis.removesuffix("s")
            raise ConfigError(
                f"There is no {what} named {name!r}.{nearest(name, known)} Known: {', '.join(known)}. A file of variants adds some."
            )
        found = []
        for section, value in known[name].items():
            keys = {f"{section}.{key}": item for key, item in value.items()} if section in MERGED else {section: value}
            found += [f"{key}={json.dumps(item)}" for key, item in keys.items()]
        return found


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    objective: str
    behaviour: str
    config: RunConfig

    @property
    def pair(self) -> tuple[str, str]:
        return self.objective, self.behaviour


def load_variants(config: Path, file: Path | None = None) -> Variants:
    """The package's variants, and those that belong to a config.

    Args:
        config: Of the comparison.
        file: Where its variants are; None: compare/NAME.yaml beside a config NAME.yaml, if there is one.

    Raises:
        ConfigError: the file is missing, not YAML, or a variant is not one.
    """
    own = config.parent / "compare" / config.name if file is None else file
    found = [_read(BUILT_IN)]
    if file is not None or own.is_file():
        found.append(_read(own))
    joined = {axis: {name: item for part in found for name, item in getattr(part, axis).items()} for axis in _AXES}
    return Variants(**joined)


def cells(
    config: Path,
    variants: Variants,
    objectives: Sequence[str],
    behaviours: Sequence[str],
    seeds: int,
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """The runs of a grid, all of the first seed first, so that an interrupted comparison has something of everything.

    Args:
        config: What every run starts from.
        variants: What the names mean.
        objectives: Names, each once.
        behaviours: Names, each once.
        seeds: How many, from the config's own upwards.
        overrides: `key.sub=value` of every run; they come last, after the variants.

    Raises:
        ConfigError: a name is unknown or given twice, there are no seeds, or a config of the grid is impossible.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}: a comparison needs at least 1; 3 show how much of a difference is luck.")
    base = load_config(config, overrides)
    folder = comparison_folder(base)
    pairs = [(a, b) for a in _once("objective", objectives) for b in _once("behaviour", behaviours)]
    found = []
    for seed in range(base.seed, base.seed + seeds):
        for a, b in pairs:
            changes = [*variants.overrides("objectives", a), *variants.overrides("behaviours", b), *overrides]
            own = [f"out={json.dumps(str(folder / 'runs'))}", f"name={json.dumps(f'{a}.{b}.{seed}')}", f"seed={seed}"]
            found.append(Cell(a, b, load_config(config, [*changes, *own])))
    return found


def comparison_folder(base: RunConfig) -> Path:
    """Where a comparison's files go: out/NAME-compare."""
    return Path(base.out, f"{base.name}-compare")


_AXES: tuple[Axis, ...] = ("objectives", "behaviours")


def _once(what: str, names: Sequence[str]) -> Iterable[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"The {what} {twice[0]!r} is given more than once.")
    return names


def _read(file: Path) -> Variants:
    if not file.is_file():
        raise ConfigError(f"There is no file of variants {str(file)!r}.")
    try:
        data = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict) or not set(data) <= set(_AXES):
        raise ConfigError(
            f"{file} must hold `objectives:` and `behaviours:`, got {data if data is None else list(data)}."
        )
    for axis, named in data.items():
        if not isinstance(named, dict):
            raise ConfigError(f"{file}, {axis}: got {named!r}; write `name: {{section: value}}` lines.")
        for name, item in named.items():
            _check(f"{file}, {axis}.{name}", name, item)
    return Variants(**data)


def _check(where: str, name: Any, item: Any) -> None:
    if not isinstance(name, str) or re.fullmatch(r"\w[\w-]*", name) is None or name == AS_CONFIGURED:
        raise ConfigError(f"{where}: a variant's name is of letters, digits, _ and -, and not {AS_CONFIGURED!r}.")
    if not isinstance(item, dict) or not all(isinstance(section, str) for section in item):
        raise ConfigError(f"{where}: got {item!r}; write {{section: value}}, e.g. {{objective: {{component: rtb}}}}.")
    for section, value in item.items():
        if section in FIXED:
            raise ConfigError(
                f"{where} changes {section!r}, which all runs of a comparison share; give it as an override."
            )
        if section in MERGED and not isinstance(value, dict):
            raise ConfigError(f"{where}.{section}: got {value!r}; write {{key: value}}.")
