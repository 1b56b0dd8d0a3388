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
from safetensors.torch import load
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

STATE, TENSORS = "state.json", ".safetensors"

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


def read_latest(folder: Path | str, known: Checkpoint | None = None) -> Checkpoint | None:
    """The content of `latest_checkpoint`, or None; each file is opened and hashed once.

    Args:
        folder: Of the checkpoints.
        known: What was read before: given back as long as there is nothing newer.

    Raises:
        CheckpointError: its files are as they were written and cannot be read nevertheless.
    """
    if known is not None:
        there = [path for path in candidates(Path(folder), replaced=True) if path.name not in known.passed_over]
        if there and there[0] == known.path:
            return known
    path, contents, passed_over = _latest(Path(folder))
    return None if path is None else Checkpoint(path, *_parsed(path, contents), passed_over)


def latest_state(folder: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json is whole, and that state; its tensors are neither read nor verified."""
    for path in candidates(Path(folder), replaced=True):
        try:
            return path, _parsed(path, _contents(path, STATE))[1]
        except CheckpointError:
            continue
    return None


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: the tensors by group and name, on the CPU, and the state.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
    """
    return _parsed(Path(path), _contents(Path(path)))


def candidates(folder: Path, *, replaced: bool = False) -> list[Path]:
    """Checkpoint folders, newest first; with `replaced` also one that a killed save had moved aside."""
    pattern = rf"({re.escape(REPLACED)})?\d{{8}}" if replaced else r"\d{8}"
    found = [p for p in folder.glob("*") if re.fullmatch(pattern, p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (p.name[-8:], not p.name.startswith(".")), reverse=True)


def sha256(content: bytes) -> str:
    """The hash of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


Contents = dict[str, bytes]
"""What the files of a checkpoint hold, by name."""


def _latest(folder: Path) -> tuple[Path | None, Contents, tuple[str, ...]]:
    damaged: list[str] = []
    for path in candidates(folder, replaced=True):
        try:
            return path, _contents(path), tuple(damaged)
        except CheckpointError as error:
            if not path.exists():  # a training that is under way has deleted it since: there is a newer one
                return _latest(folder)
            log.warning("%s It is passed over.", error)
            damaged.append(path.name)
    return None, {}, tuple(damaged)


def _parsed(path: Path, contents: Contents) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of a checkpoint whose files are as they were written."""
    tensors = {}
    for name, content in contents.items():
        if name.endswith(TENSORS):
            try:
                tensors[name.removesuffix(TENSORS)] = load(content)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path / name} is no safetensors file ({error}), although its hash is right. Delete {path} to go on from the "
                    "one before."
                ) from error
    return _Parts(tensors, str(path)), _state(path / STATE, contents.get(STATE, b""))


def _state(file: Path, content: bytes) -> dict[str, Any]:
    remedy = f"Delete {file.parent} to go on from the one before."
    try:
        found = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). {remedy}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no object. {remedy}")
    return _Parts(found, str(file))


def _contents(path: Path, only: str | None = None) -> Contents:
    """The files of a checkpoint, or one of them, each read once and found right in size and hash.

    Raises:
        CheckpointError: one is not.
    """
    expected = _manifest(path)
    return {name: _sound(path / name, *expected[name]) for name in expected if only in (None, name)}


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and hash of each file of a checkpoint."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: {path} is not a complete checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}).") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}.")
    strange = [name for name in expected if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{file} is damaged: it names {strange[0]!r}, which is no file of this checkpoint.")
    return expected


def _sound(file: Path, size: int, digest: str) -> bytes:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing from the checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if len(content) != size:
        raise CheckpointError(f"{file} is damaged: {len(content)} bytes instead of {size}.")
    if sha256(content) != digest:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in manifest.json.")
    return content
