"""metrics.json of an evaluation, as whoever shows it reads it: of this version's schema, or an error that says how to get there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["NUMBERS", "SCHEMA", "EvaluationFileError", "read_evaluation"]

SCHEMA = 2
"""Of metrics.json; `diffusion_rtb/evaluation/metrics.schema.json` says what is in it. A file without the key is of schema 1."""

NUMBERS = "metrics.json"


class EvaluationFileError(ValueError):
    """A metrics.json cannot be used; the message names the file, what is wrong, and the command that writes it anew."""


def read_evaluation(place: Path | str) -> dict[str, Any]:
    """The numbers of one evaluation.

    Args:
        place: metrics.json, or the folder that it is in.

    Raises:
        EvaluationFileError: it is not there, cannot be read, or is of another schema.
    """
    place = Path(place)
    file = place / NUMBERS if place.is_dir() else place
    redo = f"Write it anew: {_command(file)}"
    if not file.is_file():
        raise EvaluationFileError(f"There is no {file}. {redo}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EvaluationFileError(f"{file} is damaged ({error}). {redo}") from None
    if not isinstance(found, dict):
        raise EvaluationFileError(f"{file} holds a {type(found).__name__} and no evaluation. {redo}")
    schema = found.get("schema", 1)
    if schema != SCHEMA:
        known = isinstance(schema, int) and schema > SCHEMA
        newer = "It was written by a newer version: install that, or evaluate again" if known else "Write it anew"
        raise EvaluationFileError(
            f"{file} is of schema {schema!r}, and this version reads schema {SCHEMA}. {newer}: {_command(file)}"
        )
    return found


def _command(file: Path) -> str:
    """What evaluates the run whose folder the file is in; of what is no run nobody knows the command."""
    run = file.parent.parent if file.parent.name == "eval" else None
    return f"python eval.py {run if run is not None else 'SUBJECT --out ' + str(file.parent)}"
