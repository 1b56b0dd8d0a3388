"""What an interrupted evaluation had measured, batch by batch on the disk, for the same command to go on from.

FOLDER/unfinished/key.json                       a digest of everything that the batches depend on
FOLDER/unfinished/SIDE-START.safetensors         the samples from START on, without their images but for those pictured
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.evaluation.samples import Drawn, Pictured
from diffusion_rtb.files.terminal import say
from diffusion_rtb.files.whole import clear_unfinished, whole, write_json

__all__ = ["Kept", "KeptParts"]

R = TypeVar("R", bound=Rows)

Part = tuple[Drawn, Pictured]


class KeptParts:
    """The batches of one evaluation.

    Args:
        folder: Of the evaluation.
        depends: Everything that they depend on, as plain JSON values; parts of anything else are deleted, and it is said.
    """

    def __init__(self, folder: Path, depends: Mapping[str, Any]) -> None:
        self.folder = folder / "unfinished"
        key = {name: sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in depends.items()}
        there = _key(self.folder / "key.json")
        clear_unfinished(self.folder)
        if there is not None and there != key:
            changed = [name for name in key if there.get(name) != key[name]]
            say(f"{self.folder} is of an evaluation with other {' and '.join(changed)}: this one starts anew.")
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "key.json", key)

    def of(self, side: str) -> Kept:
        """Those of one side."""
        return Kept(self.folder, side)

    def remove(self) -> None:
        """All of them: the evaluation is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Kept:
    """The batches of one side."""

    def __init__(self, folder: Path, side: str) -> None:
        self.folder, self.side = folder, side

    def read(self) -> list[Part]:
        """From the first sample on as far as they are whole; what is beyond a damaged one is measured again."""
        found: list[Part] = []
        start = 0
        while (file := self._file(start)).is_file():
            try:
                held = load_file(file)
                part = _rows(Drawn, held, "drawn"), _rows(Pictured, held, "picture")
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                say(f"{file} is damaged ({error}); what it held is measured again.")
                break
            found.append(part)
            start += len(part[0])
        return found

    def write(self, start: int, part: Part) -> None:
        """A batch whose first sample is number `start`."""
        drawn, pictured = part
        with whole(self._file(start)) as unfinished:
            save_file(_tensors(drawn, "drawn") | _tensors(pictured, "picture"), unfinished)

    def _file(self, start: int) -> Path:
        return self.folder / f"{self.side}-{start:08d}.safetensors"


def _key(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tensors(rows: Rows, name: str) -> dict[str, Tensor]:
    """The fields that are there by NAME/FIELD, of a mapping by NAME/FIELD/KEY."""
    found: dict[str, Tensor] = {}
    for field in fields(rows):  # type: ignore[arg-type]
        value = getattr(rows, field.name)
        parts = {f"/{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}/{field.name}{key}": t.contiguous() for key, t in parts.items() if t is not None}
    return found


def _rows(kind: type[R], held: Mapping[str, Tensor], name: str) -> R:
    found: dict[str, Any] = {}
    for path, value in held.items():
        owner, _, rest = path.partition("/")
        if owner != name:
            continue
        field, _, key = rest.partition("/")
        if key:
            found.setdefault(field, {})[key] = value
        else:
            found[field] = value
    return kind(**found)
