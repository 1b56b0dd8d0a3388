"""Keys that configs had once, and what to write now for exactly what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusion_rtb.config.yaml_text import write_yaml

__all__ = ["MOVED", "listed", "renamed"]


def _beta_anneal(written: Any, data: Mapping[str, Any]) -> str:
    if written is None:
        return "take it out: a beta that is a number is constant."
    return f"it is a part of beta now. Write `{_beta(data, anneal=written)}`."


def _behaviour(written: Any, data: Mapping[str, Any]) -> str:
    if not isinstance(written, Mapping):
        return "it is a list of components now, `behaviours: [{component: NAME, share: 0.25}]`."
    found = f"`behaviours: {in_line(listed(written))}`"
    budget = written.get("kl_budget")
    return (
        f"it is a list of components now. Write {found}{f' and `{_beta(data, kl_budget=budget)}`' if budget else ''}."
    )


def listed(written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The components that do what a section `behaviour` did; what was switched off there is left out."""
    exploration = dict(written.get("exploration") or {})
    found: list[dict[str, Any]] = []
    if exploration.get("scale"):
        found.append({"component": "on_policy", "exploration": exploration.pop("scale"), **exploration})
    names = {"prior_share": "share", "prior_buffer": "capacity", "resample": "resample", "refresh": "refresh"}
    prior = {name: written[key] for key, name in names.items() if key in written}
    if prior:
        found.append({"component": "prior_buffer", **prior})
    for name in ("replay", "back_and_forth"):
        settings = written.get(name) or {}
        if settings.get("share"):
            found.append({"component": name, **settings})
    return found


def _beta(data: Mapping[str, Any], **moving: Any) -> str:
    value = data.get("beta", 1.0)
    written = dict(value) if isinstance(value, Mapping) else {"value": value}
    return f"beta: {in_line(written | moving)}"


def in_line(value: Any) -> str:
    """A value as YAML in one line: {value: 1.0, kl_budget: {nats: 3.0}}."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {in_line(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_line, value))}]"
    return write_yaml(value).removesuffix("\n").removesuffix("\n...")


def _judge(written: Any, data: Mapping[str, Any]) -> str:
    return (
        f"it is called eval.labeller now. Write `labeller: {in_line(written)}`; held-out rewards, which score the samples, are a "
        "list, `judges: [NAME]`."
    )


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that a checkpoint holds, with keys that only changed their name under the one they have now."""
    section = config.get("eval")
    if not isinstance(section, Mapping) or "judge" not in section:
        return dict(config)
    rest = {key: value for key, value in section.items() if key != "judge"}
    return {**config, "eval": rest | {"labeller": section["judge"]}}


MOVED: Mapping[str, Callable[[Any, Mapping[str, Any]], str]] = {
    "beta_anneal": _beta_anneal,
    "behaviour": _behaviour,
    "eval.judge": _judge,
}
"""Dotted key -> what to say, given what was written there and the whole config."""
