"""The folder of a run: made once, continued by the same config, refused to another one.

runs/NAME/
    config.yaml     the resolved config
    prompts.jsonl   its prompts and their metadata, where they were given as a file
    manifest.json   one entry per start: versions, git state, hardware, hash of the prompts
    metrics.jsonl, checkpoints/, samples/, lora/, eval/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config import ConfigError, RunConfig, config_diff, load_config, save_config
from diffusion_rtb.whole_file import write_json

__all__ = ["GROWS", "RunFolderError", "manifest_entry", "name_free_again", "open_run", "run_folder"]

GROWS = frozenset({"train.iterations"})
"""Keys that may change when a run goes on: more iterations continue it, nothing before them is affected."""

FIRST = {"config.yaml", "prompts.jsonl", "manifest.json"}
"""What is in the folder before anything was trained."""

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


class RunFolderError(ValueError):
    """The run's folder belongs to something else; the message says to what and what to do."""


def run_folder(config: RunConfig) -> Path:
    """Where the run's files go: out/name."""
    return Path(config.out, config.name)


def open_run(config: RunConfig) -> Path:
    """Make the run's folder, or reopen it for the same config, and note in its manifest what it runs on.

    Raises:
        RunFolderError: the folder holds another config, or files that are not a run.
    """
    folder = run_folder(config)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        _check_same(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    _note_start(config, folder)
    return folder


@contextmanager
def name_free_again(config: RunConfig) -> Iterator[None]:
    """Take the run's folder away again where an error ends the block before anything was trained in it.

    A config with a mistake that shows only once the prior is there could else not be corrected under its name.
    """
    folder = run_folder(config)
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new and folder.is_dir() and {path.name for path in folder.iterdir()} <= FIRST:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_same(config: RunConfig, folder: Path) -> None:
    remedy = f"Choose another name (name=...), or delete {folder} to start afresh."
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"{folder} exists and is not a run's folder: it has no config.yaml. {remedy}")
    try:
        held = load_config(folder)
    except ConfigError as error:
        raise RunFolderError(f"{folder} holds a config this version cannot read: {error}\n{remedy}") from None
    differing = {key: pair for key, pair in config_diff(held, config).items() if key not in GROWS}
    if differing:
        lines = [f"  {key}: {_short(old)} there, {_short(new)} now" for key, (old, new) in differing.items()]
        raise RunFolderError("\n".join([f"{folder} already holds a run with another config.", *lines, remedy]))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _note_start(config: RunConfig, folder: Path) -> None:
    path = folder / "manifest.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
    write_json(path, {"starts": [*entries, manifest_entry(config)]}, indent=2)


def manifest_entry(config: RunConfig) -> dict[str, Any]:
    """What a later reader needs to repeat the run: time, versions, git state, hardware, hash of the prompts."""
    prompts = config.prompts.table()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "prompts": {"count": len(prompts), "sha256": prompts.sha256, "merged": prompts.merged},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "git": _git_state(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the clone this package runs from, or None where it is not one."""
    root = Path(__file__).parents[1]
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
