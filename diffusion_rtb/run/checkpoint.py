"""Checkpoints that survive a kill at any moment and a full disk.

    FOLDER/00000040/            iteration 40; the name exists only once everything in it is on the disk
        posterior.safetensors   one file per group of tensors
        state.json              counters and whatever else is not a tensor
        manifest.json           size and SHA-256 of every other file, and of those in memories/ that it refers to

It is written into a hidden folder beside its final place, flushed, and renamed. Older ones go only after that, but the best one
(`best.py`) stays. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from diffusion_rtb.config.section import leaves
from diffusion_rtb.files.lock import one_at_a_time
from diffusion_rtb.files.whole import flush, reason_and_remedy
from diffusion_rtb.run.best import read_best
from diffusion_rtb.run.checkpoint_reading import (
    FORMAT,
    REPLACED,
    STATE,
    TENSORS,
    CheckpointError,
    candidates,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
)
from diffusion_rtb.run.memories import MEMORIES, RECORDS, Kept, Memories, Saving, clear_unused, sha256

__all__ = [
    "CheckpointError",
    "check_compatible",
    "clear_leftovers",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]

WRITING, REMOVING = ".writing-", ".removing-"
"""Folders with these prefixes are not checkpoints yet, and no longer checkpoints."""


OTHER = "The checkpoint belongs to another posterior or prior and cannot be resumed here:"
SET_BACK = "Set these back to the checkpoint's values, or start a new run under another name."


def save_checkpoint(
    folder: Path | str,
    iteration: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    memories: Memories | None = None,
) -> Path:
    """Write `folder/<iteration>` atomically, then remove checkpoints of earlier iterations beyond `keep`.

    Args:
        folder: Where the run keeps its checkpoints; created if missing. Of several processes one writes at a time.
        iteration: Names the checkpoint; one of the same iteration is replaced.
        tensors: Tensors by group and name; every group becomes one safetensors file. They may live on any device. Of a memory
            (see `memories.py`) only what is new is written.
        state: Anything JSON can hold; tuples come back as lists.
        keep: How many checkpoints stay, this one included; besides them the best one does.
        memories: What this process knows to be on the disk; brought up to date.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: `keep` or `iteration` out of range, a group name that cannot be a file name.
        TypeError: `state` holds something JSON cannot hold.
        CheckpointError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    folder = Path(folder)
    text = _checked(iteration, tensors, state, keep)
    memories = {} if memories is None else memories
    saving = {name: Saving.of(group, memories.get(name, Kept())) for name, group in tensors.items() if RECORDS in group}
    groups = {**tensors, **{name: each.rest for name, each in saving.items()}}
    room = _room(folder, [*groups.values(), *(each.fresh for each in saving.values())], text)
    final, temporary = folder / f"{iteration:08d}", folder / f"{WRITING}{iteration:08d}"
    with _explained(folder, room), one_at_a_time(folder):
        _sweep(folder)
        try:
            known = {}
            for name, each in saving.items():
                known[name], groups[name] = each.write(folder / MEMORIES / name, iteration)
            temporary.mkdir()
            _write(temporary, iteration, groups, text, known)
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _clear_memories(folder)
            raise
        memories.clear()  # what it said before may be on the disk for the checkpoints alone that go now
        memories.update(known)
        _forget(folder, iteration, keep)
    return final


def _forget(folder: Path, iteration: int, keep: int) -> None:
    """Remove checkpoints of earlier iterations beyond `keep`, the best one excepted, and what they alone refer to."""
    older = [path for path in candidates(folder) if int(path.name) < iteration]
    beyond, best = older[keep - 1 :], read_best(folder) if older[keep - 1 :] else None
    for path in beyond:
        if best is None or path.name != best.name:
            _remove(path)
    _clear_memories(folder)


def _clear_memories(folder: Path) -> None:
    """Delete the files of memories that no checkpoint refers to; of a damaged checkpoint they are of no use."""
    used: dict[str, set[str]] = {}
    for path in candidates(folder, replaced=True):
        with suppress(CheckpointError):
            for group, files in read_manifest(path)[1].items():
                used.setdefault(group, set()).update(file.name for file in files)
    clear_unused(folder, used)


def check_compatible(
    saved: Mapping[str, Any], current: Mapping[str, Any], what: str = OTHER, remedy: str = SET_BACK
) -> None:
    """Compare the fingerprint in a checkpoint with the run's own.

    Args:
        saved: In the checkpoint.
        current: The run's own.
        what: How the message begins.
        remedy: How it ends.

    Raises:
        CheckpointError: they differ; every differing key is listed with both values.
    """
    # The saved one went through JSON: compare the two as JSON shows them.
    was, now = (
        {key: json.dumps(value, sort_keys=True) for key, value in leaves(json.loads(json.dumps(fingerprint)))}
        for fingerprint in (saved, current)
    )
    differing = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
    if differing:
        lines = [
            f"  {key}: {was.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now" for key in differing
        ]
        raise CheckpointError("\n".join([what, *lines, remedy]))


def _checked(iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> bytes:
    """Refuse what cannot be saved before anything is written; returns the state as JSON."""
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the checkpoint just written must stay, so keep >= 1.")
    if not 0 <= iteration < 10**8:
        raise ValueError(f"iteration is {iteration}: it must be in [0, 10^8).")
    for name in tensors:
        if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise ValueError(f"Group {name!r} cannot be a file name: use letters, digits, '_' and '-'.")
    _require_json(state, "state")
    return json.dumps(state, indent=1).encode()


def _require_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; JSON keys are strings.")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_json(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold; tensors belong in `tensors`.")


def _write(
    folder: Path, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes, memories: Memories
) -> None:
    files = {}
    for name, content in _contents(tensors, state):
        (folder / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": sha256(content)}
    referred = {name: [asdict(file) for file in kept.files] for name, kept in memories.items()}
    manifest = {"format": FORMAT, "iteration": iteration, "files": files, "memories": referred}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def _contents(tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, one after the other: only one of them is held besides the tensors."""
    for name in sorted(tensors):
        yield f"{name}{TENSORS}", save(_own_memory(tensors[name]))
    yield STATE, state


def _own_memory(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory: safetensors refuses views of one storage."""
    seen: set[int] = set()
    result = {}
    for name, tensor in group.items():
        value = tensor.detach().to("cpu").contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place; one of the same iteration steps aside first and stays findable until then."""
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    flush(final.parent)
    if aside.exists():
        _remove(aside)


def clear_leftovers(folder: Path) -> None:
    """Clear what killed saves left behind; whoever calls it is the only one to write there."""
    if folder.is_dir():
        with one_at_a_time(folder):
            _sweep(folder)
            _clear_memories(folder)


def _sweep(folder: Path) -> None:
    """Clear what a killed save left behind."""
    for path in folder.glob(".*"):
        if path.name.startswith(REPLACED) and not (final := folder / path.name.removeprefix(REPLACED)).exists():
            path.rename(final)  # killed between the two renames of `_publish`
        elif path.name.startswith((WRITING, REPLACED, REMOVING)):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Delete a folder so that a kill halfway leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(REMOVING + path.name)
    with suppress(OSError):  # the new checkpoint is safe: an undeletable old one is no reason to stop the run
        path.rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def _explained(folder: Path, needed: int) -> Iterator[None]:
    """Turn a failed write into an error that says what is missing and what still stands."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, remedy = reason_and_remedy(error, folder, needed)
        if "free some space" in remedy:
            remedy += ", lower train.keep_checkpoints, or move the run's folder to a larger disk and go on there"
        previous = latest_checkpoint(folder)
        kept = f"{previous} is intact and can be resumed" if previous else "there is no earlier checkpoint"
        raise CheckpointError(
            f"The checkpoint in {folder} was not written: {reason}; {kept}. To go on, {remedy}."
        ) from error


def _room(folder: Path, groups: Sequence[Mapping[str, Tensor]], state: bytes) -> int:
    """Bytes that a checkpoint takes on this disk, whole blocks and names included."""
    block = (
        next(os.statvfs(p).f_frsize for p in (folder, *folder.parents) if p.exists()) if os.name == "posix" else 4096
    )
    sizes = [sum(t.numel() * t.element_size() + 100 + len(name) for name, t in group.items()) for group in groups]
    return sum(-(-size // block) * block for size in (*sizes, len(state), 150 * (len(sizes) + 2), block))
