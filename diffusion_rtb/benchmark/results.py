"""What has been measured, in one file that is whole after every part; a second call goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rtb.files.whole import write_json

__all__ = ["Results"]

FILE = "benchmark.json"


class Results:
    """The results in a folder, by part.

    Args:
        folder: Where `benchmark.json` is, or is going to be.
        machine: What measures now.

    Raises:
        ValueError: the file holds results of another machine, or is damaged.
    """

    def __init__(self, folder: Path, machine: Mapping[str, Any]) -> None:
        self.file = folder / FILE
        self.machine = dict(machine)
        self.parts: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            was, self.parts = found["machine"], dict(found["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.file} is damaged ({error}): delete it, or name another folder by --out."
            ) from error
        other = [key for key in {**was, **self.machine} if was.get(key) != self.machine.get(key)]
        if other:
            shown = "; ".join(f"{key} {was.get(key)!r}, here {self.machine.get(key)!r}" for key in other)
            raise ValueError(
                f"{self.file} was measured elsewhere or with other versions ({shown}), and numbers of two machines are not mixed: "
                "name another folder by --out."
            )

    def done(self, name: str) -> bool:
        """Whether a part has a result; that it ran out of memory is one, that it failed or had no time is not."""
        return name in self.parts and not {"failed", "skipped"} & self.parts[name].keys()

    def put(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep a part's result, on disk too."""
        self.parts[name] = dict(found)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"machine": self.machine, "parts": self.parts})

    def rate(self, dtype: str) -> float | None:
        """The machine's matrix rate in a dtype, FLOP/s."""
        found = self.parts.get(f"{dtype}-rate", {}).get("flop_per_second")
        return None if found is None else float(found)
