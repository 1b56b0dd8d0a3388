"""Find and read checkpoints: the newest whole one, verified once; damaged ones are passed over with a warning."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from diffusion_rtb.run.best import read_best
from diffusion_rtb.run.memories import MEMORIES, Memories, MemoryFile, remembered, sha256

__all__ = [
    "AVERAGE",
    "FORMAT",
    "REPLACED",
    "Checkpoint",
    "CheckpointError",
    "candidates",
    "latest_checkpoint",
    "latest_state",
    "load_checkpoint",
    "read_chosen",
    "read_latest",
    "read_manifest",
]

FORMAT = "diffusion_rtb.checkpoint/2"

STATE, TENSORS = "state.json", ".safetensors"

AVERAGE = "ema"
"""Part of a checkpoint: the moving average of the posterior's parameters, where `train.ema` asks for one."""

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
    memories: Memories = field(default_factory=dict)
    """Where the memories lie that were read with it."""


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete checkpoint in `folder`, or None; damaged ones are passed over with a warning."""
    found, _ = _latest(Path(folder), memories=False)
    return None if found is None else found.path


def read_latest(folder: Path | str, known: Checkpoint | None = None, *, memories: bool = True) -> Checkpoint | None:
    """The content of `latest_checkpoint`, or None; each file is opened and hashed once.

    Args:
        folder: Of the checkpoints.
        known: What was read before: given back as long as there is nothing newer.
        memories: False: what behaviours remember is verified and not kept.

    Raises:
        CheckpointError: its files are as they were written and cannot be read nevertheless.
    """
    if known is not None:
        there = [path for path in candidates(Path(folder), replaced=True) if path.name not in known.passed_over]
        if there and there[0] == known.path:
            return known
    found, passed_over = _latest(Path(folder), memories)
    return None if found is None else found.parsed(passed_over)


def read_chosen(folder: Path, which: str) -> Checkpoint:
    """The content of one checkpoint, without what behaviours remember.

    Args:
        folder: Of the checkpoints.
        which: "best", see `best.py`; or an iteration.

    Raises:
        CheckpointError: there is none of that name, or it is damaged.
    """
    there = [path.name for path in candidates(folder)]
    best = read_best(folder) if which == "best" else None
    if which == "best" and best is None:
        raise CheckpointError(
            f"{folder} names no best checkpoint. One is chosen by the section `watch` of the config while training, from looks "
            f"that raise no alarm. Take the latest one, or one of these: {', '.join(there) or 'there are none'}."
        )
    if best is None and not (which.isascii() and which.isdecimal()):
        raise CheckpointError(f"There is no checkpoint {which!r}: it is latest, best, or one of {', '.join(there)}.")
    name = f"{int(which):08d}" if best is None else best.name
    if name not in there:
        raise CheckpointError(f"{folder} has no checkpoint {name}. Those kept: {', '.join(there) or 'none'}.")
    return _Contents.of(folder / name, memories=False).parsed()


def latest_state(folder: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state.json is whole, and that state; its tensors are neither read nor verified."""
    for path in candidates(Path(folder), replaced=True):
        try:
            size, digest = read_manifest(path)[0][STATE]
            return path, _state(path / STATE, _sound(path / STATE, size, digest))
        except (CheckpointError, KeyError):
            continue
    return None


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: the tensors by group and name, on the CPU, and the state.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
    """
    found = _Contents.of(Path(path), memories=True).parsed()
    return found.tensors, found.state


def candidates(folder: Path, *, replaced: bool = False) -> list[Path]:
    """Checkpoint folders, newest first; with `replaced` also one that a killed save had moved aside."""
    pattern = rf"({re.escape(REPLACED)})?\d{{8}}" if replaced else r"\d{8}"
    found = [p for p in folder.glob("*") if re.fullmatch(pattern, p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (p.name[-8:], not p.name.startswith(".")), reverse=True)


@dataclass(frozen=True)
class _Contents:
    """What the files of a checkpoint hold, each read once and found right in size and hash."""

    path: Path
    files: dict[str, bytes]
    memories: dict[str, tuple[tuple[MemoryFile, ...], list[bytes]]]
    """Files of each memory and what they hold; empty where that is not asked for."""

    @staticmethod
    def of(path: Path, memories: bool) -> _Contents:
        """Read a checkpoint.

        Raises:
            CheckpointError: a file is not what was written.
        """
        expected, referred = read_manifest(path)
        files = {name: _sound(path / name, *expected[name]) for name in expected}
        held = {}
        for group, parts in referred.items():
            contents = []
            for part in parts:
                content = _sound(path.parent / MEMORIES / group / part.name, part.bytes, part.sha256)
                contents += [content] if memories else []
            held[group] = parts, contents
        return _Contents(path, files, held if memories else {})

    def parsed(self, passed_over: tuple[str, ...] = ()) -> Checkpoint:
        """The tensors and the state.

        Raises:
            CheckpointError: a file is as it was written and cannot be read nevertheless.
        """
        tensors, kept = {}, {}
        for name, content in self.files.items():
            if name.endswith(TENSORS):
                with self._named(name):
                    tensors[name.removesuffix(TENSORS)] = load(content)
        for group, (files, contents) in self.memories.items():
            with self._named(f"{MEMORIES}/{group}"):
                tensors[group], kept[group] = remembered(tensors[group], files, contents)
        state = _state(self.path / STATE, self.files.get(STATE, b""))
        return Checkpoint(self.path, _Parts(tensors, str(self.path)), state, passed_over, kept)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / name} is no safetensors file ({error}), although its hash is right. Delete {self.path} to go on "
                "from the one before."
            ) from error


def _latest(folder: Path, memories: bool) -> tuple[_Contents | None, tuple[str, ...]]:
    damaged: list[str] = []
    for path in candidates(folder, replaced=True):
        try:
            return _Contents.of(path, memories), tuple(damaged)
        except CheckpointError as error:
            if not path.exists():  # a training that is under way has deleted it since: there is a newer one
                return _latest(folder, memories)
            log.warning("%s It is passed over.", error)
            damaged.append(path.name)
    return None, tuple(damaged)


def _state(file: Path, content: bytes) -> dict[str, Any]:
    remedy = f"Delete {file.parent} to go on from the one before."
    try:
        found = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). {remedy}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no object. {remedy}")
    return _Parts(found, str(file))


def read_manifest(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[MemoryFile, ...]]]:
    """Name -> size and hash of each file of a checkpoint, and the files of memories that it refers to, by group.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}.")
        memories = {
            group: tuple(MemoryFile(**entry) for entry in entries) for group, entries in manifest["memories"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: {path} is not a complete checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}).") from error
    named = [*expected, *memories, *(part.name for parts in memories.values() for part in parts)]
    strange = [name for name in named if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{file} is damaged: it names {strange[0]!r}, which is no file of this checkpoint.")
    return expected, memories


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
