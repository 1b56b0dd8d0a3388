"""manifest.json of a run's folder: one entry per start, with what a later reader needs to repeat it."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config.load import RunConfig

__all__ = ["MANIFEST", "last_directory", "manifest_text", "started_from", "versions"]

MANIFEST = "manifest.json"

LIBRARIES = (
    "diffusion-rtb",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
)

log = logging.getLogger(__name__)


def manifest_text(config: RunConfig, folder: Path, start: Mapping[str, Any] | None = None) -> str:
    """The manifest with one entry more; one that cannot be read is kept under another name, and a new one begun.

    `start` is what it says of the run that this one starts from.
    """
    path = folder / MANIFEST
    try:
        starts = _starts(path)
    except ValueError as error:
        aside = next(p for i in range(10**6) if not (p := folder / f"{path.stem}.damaged-{i}.json").exists())
        path.rename(aside)
        log.warning("%s is damaged (%s). It is kept as %s, and a new one begun.", path, error, aside.name)
        starts = []
    return (
        json.dumps({"starts": [*starts, _entry(config) | ({} if start is None else {"start": dict(start)})]}, indent=2)
        + "\n"
    )


def last_directory(folder: Path) -> str | None:
    """The working directory that a run was last started in, from which its config's relative paths count."""
    try:
        starts = _starts(folder / MANIFEST)
        return str(starts[-1]["directory"]) if starts else None
    except (ValueError, KeyError, TypeError):
        return None


def started_from(folder: Path) -> dict[str, Any] | None:
    """What a run's manifest says of the run whose posterior it began with; None where that was the prior, or nothing is known."""
    try:
        return next((dict(entry["start"]) for entry in reversed(_starts(folder / MANIFEST)) if "start" in entry), None)
    except (ValueError, TypeError):
        return None


def _starts(path: Path) -> list[Any]:
    """The entries so far.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or not isinstance(held.get("starts"), list):
        raise ValueError("it holds no list of starts")
    return list(held["starts"])


def _entry(config: RunConfig) -> dict[str, Any]:
    """What a later reader needs to repeat the run: time, command, versions, git state, hardware, hash of the prompts."""
    prompts = config.prompts.table()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "prompts": {"count": len(prompts), "sha256": prompts.sha256, "merged": prompts.merged},
        "versions": versions(),
        "git": _git_state(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def versions() -> dict[str, str | None]:
    """Of Python and of what decides numbers; None where a library is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the clone this package runs from, or None where it is not one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit, changed = (_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no"))
    return None if commit is None else {"commit": commit, "changed": bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
