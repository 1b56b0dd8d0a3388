"""Read a run's config from YAML and `key.sub=value` overrides, save it resolved, compare two.

The sections themselves are in `sections.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.config.moved import MOVED
from diffusion_rtb.config.prompt_files import find_file, read_prompts
from diffusion_rtb.config.section import leaves
from diffusion_rtb.config.sections import Component, EvalConfig, Factor, PromptsConfig, RunConfig, Section, TrainConfig
from diffusion_rtb.config.yaml_text import read_yaml, write_yaml

__all__ = [
    "Component",
    "ConfigError",
    "EvalConfig",
    "Factor",
    "RunConfig",
    "TrainConfig",
    "config_diff",
    "config_schema",
    "config_text",
    "field_types",
    "load_config",
    "load_eval",
]

CONFIG, PROMPTS = "config.yaml", "prompts.jsonl"
"""Names in a run's folder."""

LISTED, SHOWN = 20, 400
"""Problems that one message lists; characters of a value that it shows."""


ELSEWHERE = {
    "batch_size": "train.prompts_per_iteration times train.group is that of an iteration, train.micro_batch what is in memory",
    "train_batch_size": "See train.prompts_per_iteration, train.group and train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch says how many trajectories are in memory at once",
    "learning_rate": "It is called train.lr",
    "epochs": "It is called train.iterations",
    "num_epochs": "It is called train.iterations",
    "max_steps": "It is called train.iterations",
    "steps": "train.iterations are those of training, prior.steps those of denoising",
    "num_inference_steps": "It is called prior.steps",
    "guidance_scale": "It is called prior.guidance",
    "mixed_precision": "It is prior.dtype that decides: float32, float16 or bfloat16",
    "model": "It is called prior.path",
    "pretrained_model_name_or_path": "It is called prior.path",
    "lora_rank": "It is called posterior.rank",
    "lora_alpha": "It is called posterior.alpha",
    "kl_weight": "beta is its inverse: nats per unit of reward",
    "kl_coef": "beta is its inverse: nats per unit of reward",
    "prompt": "It is called prompts.list",
    "output_dir": "The folder is out/name",
    "report_to": "It is called train.tracker",
    "save_steps": "It is called train.checkpoint_every",
}
"""What other trainers call a key, and what does it here; a name of the same letters would mislead."""


class ConfigError(ValueError):
    """A config cannot be used; the message lists every problem with its key, the value received and the remedy."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, or the one in a run's folder.

    Prompts from a file are read now; a run keeps them beside its config. A config without a name is named after its
    file.

    Args:
        path: A YAML file, or a folder with a `config.yaml`.
        overrides: `key.sub=value`, the value in YAML: `train.lr=1e-4`, `train.rounding_share=null`, `prompts.list=[a, b]`.

    Raises:
        ConfigError: the file is missing or not YAML; a key is unknown; a value is not allowed.
    """
    path = Path(path).expanduser()
    file = path / CONFIG if path.is_dir() else path
    data = _read(file)
    for override in overrides:
        _override(data, override)
    if file.name != CONFIG:
        data.setdefault("name", file.stem)
    source = " ".join([str(file), *overrides])
    config = _validate(data, source)
    if config.prompts.file is None:
        return config
    try:
        found = find_file(config.prompts.file, file.parent)
        prompts = config.prompts.holding(read_prompts(found), found.parent)
        config.check_count(len(prompts.texts()))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config.model_copy(update={"prompts": prompts})


def load_eval(overrides: Sequence[str] = ()) -> EvalConfig:
    """The section `eval:` alone, of what has no config.

    Raises:
        ConfigError: see `load_config`.
    """
    data: dict[str, Any] = {"eval": {}}
    for override in overrides:
        _override(data, override)
    try:
        return EvalConfig.model_validate(data["eval"])
    except ValidationError as error:
        problems = [
            _problem({**detail, "loc": ("eval", *detail["loc"])}, data) for detail in error.errors(include_url=False)
        ]
        raise ConfigError("\n  ".join([f"{_short(_escaped(' '.join(overrides)))}:", *problems])) from None


def config_text(config: RunConfig) -> str:
    """The resolved config as YAML, defaults included; `load_config` reads it back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def config_diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a, value in b), where they differ; a missing argument of a component counts as None.

    Prompts are compared by what they are, wherever they are kept.
    """
    left, right = (dict(leaves(config.model_dump(mode="json", exclude={"prompts"}))) for config in (a, b))
    left["prompts"], right["prompts"] = _prompts_apart(a.prompts, b.prompts)
    keys = [*left, *(key for key in right if key not in left)]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _prompts_apart(a: PromptsConfig, b: PromptsConfig) -> tuple[str, str]:
    """Words for the prompts of two configs, the same only if they are."""
    if a.digest == b.digest:
        return a.digest, a.digest
    if a.held and b.held:
        return a.table().difference(b.table()), b.table().difference(a.table())
    return f"sha256 {a.digest}", f"sha256 {b.digest}"


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors."""
    return RunConfig.model_json_schema()


def field_types(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, the section that owns it, field name) of every field of a config, nested sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", model, name
        for section in _sections(field.annotation):
            yield from field_types(section, f"{prefix}{name}.")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        beside = [str(other) for other in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
        raise ConfigError(f"There is no config {str(file)!r}.{nearest(str(file), beside)}")
    try:
        data = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{file} must hold `key: value` lines, got {type(data).__name__}.")
    return data


def _override(data: dict[str, Any], override: str) -> None:
    """Set one key in place."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"Override {_cut(override)} is not of the form key.sub=value, e.g. train.lr=1e-4.")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {_cut(override)}: the value is not YAML ({error}). Quote it?") from None
    place: Any = data
    for i, part in enumerate(parts[:-1]):
        place = _enter(place, part, f"Override {_cut(override)}: {'.'.join(parts[: i + 1])}")
    if isinstance(place, list):
        place[_index(place, parts[-1], f"Override {_cut(override)}")] = value
    elif isinstance(place, dict):
        place[parts[-1]] = value
    else:
        raise ConfigError(f"Override {_cut(override)}: {'.'.join(parts[:-1])} is {_cut(place)} and has no keys.")


def _enter(place: Any, part: str, what: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, what)]
    if not isinstance(place, dict):
        raise ConfigError(f"{what} does not exist: what it would be in is {_cut(place)} and has no keys.")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _index(items: Sequence[Any], part: str, what: str) -> int:
    """A position, or the name of the one component in the list that has it."""
    named = [i for i, item in enumerate(items) if isinstance(item, Mapping) and item.get("component") == part]
    if len(named) == 1:
        return named[0]
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{what}: {part!r} is not a position in a list of {len(items)} (0 to {len(items) - 1}).")
    return int(part)


def _validate(data: Mapping[str, Any], source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [_problem(detail, data) for detail in found[:LISTED]]
        if len(found) > LISTED:
            problems.append(f"... and {len(found) - LISTED} more.")
        count = "one problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError("\n  ".join([f"{_short(_escaped(source))}: {count}", *problems])) from None


def _problem(detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if key == "beta.value" and not isinstance(data.get("beta"), Mapping):
        key = "beta"
    received = detail["input"]
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    match detail["type"]:
        case "extra_forbidden" if key in MOVED:
            return f"{key}: {MOVED[key](received, data)}"
        case "extra_forbidden":
            return f"{key}: there is no such key.{_nearest_key(key)}"
        case "missing":
            return f"{key}: this key is required."
        case "value_error":
            # The message of our own checks names the values already.
            return f"{key}: {message}." if key else f"{message}."
    if detail["type"] == "model_type":
        message = "Input should be a section: keys and values below it"
    expected = message.replace("valid tuple", "list")
    return f"{key}: got {_cut(received)} ({type(received).__name__}). {expected}."


def _nearest_key(key: str) -> str:
    """The known key that `key` was meant to be: one beside it, else one of the same last part anywhere."""
    section, _, last = key.rpartition(".")
    if last in ELSEWHERE:
        return f" {ELSEWHERE[last]}."
    known = [dotted for dotted, _, _ in field_types()]
    # Positions in lists are no part of a known key.
    section = ".".join(part for part in section.split(".") if not part.isdigit())
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    for names in (beside, anywhere):
        close = get_close_matches(last, names, n=1)
        if close:
            return f" Did you mean {names[close[0]]!r}?"
    return f" Known here: {', '.join(beside.values())}."


def _cut(value: Any) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _escaped(text: str) -> str:
    """Control characters as `repr` writes them, without its quotes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
