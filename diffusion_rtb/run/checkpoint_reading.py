"""Find and read checkpoints: the newest whole one, verified once; damaged ones are passed over with a warning."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "FORMAT",
    "REPLACED",
    "Checkpoint",
    "CheckpointError",
    "candidates",
    "latest_checkpoint",
    "latest_state",
    "load_checkpoint",
    "read_latest",
    "sha256",
]

FORMAT = "diffusion_rtb.checkpoint/1"

REPLACED = ".replaced-"
"""Folders with this prefix are about to be replaced by a checkpoint of the same iteration."""

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read, or does not belong to this run; the message says what to do."""


class _Parts(dict[str, Any]):
    """A dictionary that names the file in which a key is missing."""

    def __init__(self, content: Mapping[str, Any], source: str) -> None:
        super().__init__(content)
        self._source = source

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(
            f"{self._source} has no {key!r}, it has {', '.join(map(repr, self)) or 'nothing'}: it was changed, or written by "
            "another version. Delete that checkpoint's folder to go on from the one before."
        )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint holds, verified and read once."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """By group and name, on the CPU."""
    state: dict[str, Any]
    passed_over: tuple[str, ...] = ()
    """Names of newer checkpoints that are damaged."""


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete checkpoint in `folder`, or None; damaged ones are passed over with a warning."""
    return _latest(Path(folder))[0]


def read_latest(folder: Path | str) -> Checkpoint | None:
    """The content of `latest_checkpoint`, or None; each file is hashed once.

    Raises:
        CheckpointError: its files are as they were written and cannot be read nevertheless.
    """
    for attempt in range(3):
        path, passed_over = _latest(Path(folder))
        if path is None:
            return None
        try:
            return Checkpoint(path, *_read(path), passed_over)
        except FileNotFoundError:  # a training that is under way has deleted it since: there is a newer one
            if attempt == 2:
                raise
    return None


def latest_state(folder: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json is whole, and that state; its tensors are neither read nor verified."""
    for path in candidates(Path(folder), replaced=True):
        try:
            expected = _manifest(path)["state.json"]
            if _fault(path / "state.json", expected) is None:
                return path, _state(path)
        except (CheckpointError, KeyError, OSError):
            continue
    return None


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: the tensors by group and name, on the CPU, and the state.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
    """
    _verify(Path(path))
    return _read(Path(path))


def candidates(folder: Path, *, replaced: bool = False) -> list[Path]:
    """Checkpoint folders, newest first; with `replaced` also one that a killed save had moved aside."""
    pattern = rf"({re.escape(REPLACED)})?\d{{8}}" if replaced else r"\d{8}"
    found = [p for p in folder.glob("*") if re.fullmatch(pattern, p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (p.name[-8:], not p.name.startswith(".")), reverse=True)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _latest(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    damaged = []
    for path in candidates(folder, replaced=True):
        try:
            _verify(path)
        except CheckpointError as error:
            log.warning("%s It is passed over.", error)
            damaged.append(path.name)
        else:
            return path, tuple(damaged)
    return None, tuple(damaged)


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of a checkpoint that was verified."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is no safetensors file ({error}), although its hash is right. Delete {path} to go on from the one before."
            ) from error
    return _Parts(tensors, str(path)), _state(path)


def _state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Delete {path} to go on from the one before.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no object. Delete {path} to go on from the one before.")
    return _Parts(found, str(file))


def _verify(path: Path) -> None:
    """Find size and hash of every file of the manifest right."""
    for name, expected in _manifest(path).items():
        fault = _fault(path / name, expected)
        if fault is not None:
            raise CheckpointError(fault)


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and hash of each file of a checkpoint."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: {path} is not a complete checkpoint.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}).") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}.")
    strange = [name for name in expected if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{file} is damaged: it names {strange[0]!r}, which is no file of this checkpoint.")
    return expected


def _fault(file: Path, expected: tuple[int, str]) -> str | None:
    size, digest = expected
    if not file.is_file():
        return f"{file} is missing from the checkpoint."
    if file.stat().st_size != size:
        return f"{file} is damaged: {file.stat().st_size} bytes instead of {size}."
    if sha256(file) != digest:
        return f"{file} is damaged: its SHA-256 is not the one in manifest.json."
    return None
