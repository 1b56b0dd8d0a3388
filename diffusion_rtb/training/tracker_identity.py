"""Which run of a tracker a run of ours is: a resumed one goes on there, also after its folder was moved or renamed."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.files.whole import write_json

__all__ = ["FILE", "tracker_arguments"]

FILE = "trackers.json"

log = logging.getLogger(__name__)


def tracker_arguments(folder: Path, names: Sequence[str], start: int) -> dict[str, dict[str, Any]]:
    """What each tracker is started with, so that it continues its run of this folder and writes into this folder.

    The names it knows the run by are kept in FOLDER/trackers.json.

    Args:
        folder: The run's.
        names: Trackers.
        start: The iteration that comes next: what tensorboard holds of later ones is not shown.
    """
    known = _known(folder / FILE)
    arguments: dict[str, dict[str, Any]] = {}
    for name in names:
        again = name in known
        if name == "wandb":
            known.setdefault(name, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
            arguments[name] = {"name": folder.name, "id": known[name], "resume": "allow", "dir": str(folder)}
        elif name == "trackio":
            # Trackio knows runs by name: one of this name that is not in the file is another folder's.
            known.setdefault(name, folder.name)
            arguments[name] = {"name": known[name], "resume": "allow" if again else "never"}
        elif name == "tensorboard" and start > 0:
            arguments[name] = {"purge_step": start}
    if known:
        write_json(folder / FILE, known)
    return arguments


def _known(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {str(name): str(run) for name, run in found.items()}
    except (ValueError, AttributeError) as error:
        log.warning("%s is damaged (%s): the trackers begin new runs.", path, error)
        return {}
