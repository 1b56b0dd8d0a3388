"""Which checkpoint of a run is the best one by the policy of `watch:`: named in a file beside them, and kept when others go.

FOLDER/best.json        {"iteration": 40, "policy": "frontier", ...}; written whole, and only once that checkpoint is there
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_rtb.files.whole import write_json

__all__ = ["BEST", "Best", "read_best", "write_best"]

BEST = "best.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best look of a run at its posterior so far."""

    iteration: int
    """Of the checkpoint."""
    policy: str
    """By which it is the best."""
    numbers: Mapping[str, float]
    """What was seen of it, by the names of metrics.jsonl."""
    settings: Mapping[str, Any]
    """What was drawn and measured: looks of other settings cannot be compared with it."""

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"{self.iteration:08d}"


def read_best(folder: Path) -> Best | None:
    """What is known to be the best of a folder of checkpoints; None where nothing is, or with a warning where it is damaged."""
    file = folder / BEST
    if not file.is_file():
        return None
    try:
        found = Best(**json.loads(file.read_text(encoding="utf-8")))
        return Best(int(found.iteration), str(found.policy), dict(found.numbers), dict(found.settings))
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): no checkpoint is known to be the best until one is chosen anew.", file, error)
        return None


def write_best(folder: Path, best: Best) -> None:
    """Name a checkpoint that is on the disk as the best; it is kept until another one is."""
    write_json(folder / BEST, asdict(best))
