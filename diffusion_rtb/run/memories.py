"""What behaviours remember, beside the checkpoints: each record is written once, and checkpoints say where it lies.

    FOLDER/memories/GROUP/00000120-5f3a9c01d2e47b86.safetensors     what came since the checkpoint before; named by its content

A group of tensors is a memory if it has `records` (n, 2), the prompt row and number of each record, a pair that no other record
of the run has. Its tensors `record.*` have a row for each of them; a checkpoint holds the others, and `places` (n, 2): in which
of its files, and there in which row, each record lies. Files are on the disk before the checkpoint that refers to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffusion_rtb.files.whole import clear_unfinished, flush, whole

__all__ = ["MEMORIES", "RECORDS", "Kept", "Memories", "MemoryFile", "Saving", "clear_unused", "remembered", "sha256"]

MEMORIES = "memories"
RECORDS, RECORD, PLACES = "records", "record.", "places"

SPARSE = 2
"""Files with more than this many records for each that is still remembered are given up, and what is remembered written anew."""


def sha256(content: bytes) -> str:
    """The hash of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class MemoryFile:
    """A file of records, as a checkpoint refers to it."""

    name: str
    bytes: int
    sha256: str
    records: int


@dataclass(frozen=True)
class Kept:
    """Where the records of one memory lie."""

    files: tuple[MemoryFile, ...] = ()
    places: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(prompt row, number) -> (file, row in it)."""


Memories = dict[str, Kept]
"""What a process knows to be on the disk, by group: of the checkpoint that it goes on from, or wrote last."""


@dataclass(frozen=True)
class Saving:
    """A memory on its way to the disk."""

    kept: Kept
    keys: tuple[tuple[int, int], ...]
    fresh: dict[str, Tensor]
    """Records that are in no file yet; empty if there are none."""
    rest: dict[str, Tensor]
    """What the checkpoint itself holds."""

    @staticmethod
    def of(group: Mapping[str, Tensor], kept: Kept) -> Saving:
        """What of a memory is new since `kept`."""
        keys = tuple((row, number) for row, number in group[RECORDS].tolist())
        kept = _still_used(kept, keys)
        new = torch.tensor([i for i, key in enumerate(keys) if key not in kept.places], dtype=torch.long)
        fresh = (
            {name: tensor[new].cpu() for name, tensor in group.items() if name.startswith(RECORD)} if len(new) else {}
        )
        rest = {name: tensor for name, tensor in group.items() if not name.startswith(RECORD)}
        return Saving(kept, keys, fresh, rest)

    def write(self, folder: Path, iteration: int) -> tuple[Kept, dict[str, Tensor]]:
        """Write what is new into FOLDER; returns where everything is then, and what the checkpoint holds."""
        files, places = list(self.kept.files), dict(self.kept.places)
        if self.fresh:
            content = save(self.fresh)
            digest, new = sha256(content), [key for key in self.keys if key not in places]
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{iteration:08d}-{digest[:16]}.safetensors"
            with whole(folder / name) as unfinished:
                unfinished.write_bytes(content)
            flush(folder.parent)
            places |= {key: (len(files), i) for i, key in enumerate(new)}
            files.append(MemoryFile(name, len(content), digest, len(new)))
        where = torch.tensor([places[key] for key in self.keys], dtype=torch.long).reshape(-1, 2)
        return Kept(tuple(files), places), self.rest | {PLACES: where}


def _still_used(kept: Kept, keys: tuple[tuple[int, int], ...]) -> Kept:
    """Without the files of which nothing is remembered; nothing, where most of what they hold is forgotten."""
    places = {key: kept.places[key] for key in keys if key in kept.places}
    used = sorted({file for file, _ in places.values()})
    files = tuple(kept.files[file] for file in used)
    if sum(file.records for file in files) > SPARSE * len(keys):
        return Kept()
    number = {file: i for i, file in enumerate(used)}
    return Kept(files, {key: (number[file], row) for key, (file, row) in places.items()})


def remembered(
    held: Mapping[str, Tensor], files: tuple[MemoryFile, ...], contents: list[bytes]
) -> tuple[dict[str, Tensor], Kept]:
    """The group that was saved, of what the checkpoint holds of it and the files it refers to; and where it lies."""
    places = held[PLACES]
    records: dict[str, Tensor] = {}
    for number, content in enumerate(contents):
        here = (places[:, 0] == number).nonzero().flatten()
        for name, tensor in load(content).items():
            whole_one = records.setdefault(name, tensor.new_empty((len(places), *tensor.shape[1:])))
            whole_one[here] = tensor[places[here, 1]]
    keys = [(row, number) for row, number in held[RECORDS].tolist()]
    kept = Kept(files, dict(zip(keys, [(file, row) for file, row in places.tolist()], strict=True)))
    return {name: tensor for name, tensor in held.items() if name != PLACES} | records, kept


def clear_unused(folder: Path, used: Mapping[str, Any]) -> None:
    """Delete the files of FOLDER/memories but those `used`, names by group; whoever calls it is the only one to write there."""
    for group in (folder / MEMORIES).glob("*"):
        clear_unfinished(group)
        for path in group.glob("*.safetensors"):
            if path.name not in used.get(group.name, ()):
                path.unlink(missing_ok=True)
