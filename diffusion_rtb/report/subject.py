"""What is on the disk of one evaluated subject: its numbers, its samples, its pictures, and the rows of its training."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from diffusion_rtb.files.evaluations import NUMBERS, read_evaluation
from diffusion_rtb.report.numbers import at, number
from diffusion_rtb.run.metrics_file import METRICS, read_rows

__all__ = ["EMPTY", "Picture", "Subject", "read_subject"]

SAMPLES, PICTURES, SHEET = "samples.safetensors", "pictures.json", "side_by_side.png"

EMPTY = "(the empty prompt)"
"""How it is shown."""

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Picture:
    """One sample that is shown, in the bytes that were written."""

    content: bytes
    kind: str
    """Its media type."""
    width: int
    height: int
    side: str = "posterior"
    prompt: int = 0
    index: int = 0
    """k of the sample: equal k is equal noise on both sides."""
    reward: float | None = None
    judges: Mapping[str, float] = field(default_factory=dict)
    why: str = "pair"


@dataclass(frozen=True, eq=False)
class Subject:
    """One evaluated subject as its files say."""

    folder: Path
    numbers: dict[str, Any]
    samples: dict[str, Shaped[np.ndarray, "..."]]
    pictures: tuple[Picture, ...]
    sheet: Picture | None
    """The side-by-side picture of vectors, which have no pictures of their own."""
    training: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]
    """What could not be read, in sentences."""

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return str(at(self.numbers, "subject", "name") or self.folder.name)

    @property
    def kind(self) -> str:
        """run, lora or images."""
        return str(at(self.numbers, "subject", "kind") or "run")

    @property
    def overall(self) -> dict[str, Any]:
        """The numbers over all prompts."""
        return dict(at(self.numbers, "overall") or {})

    @property
    def beta(self) -> float | None:
        """nats per unit of reward; None where nobody knows it."""
        return number(self.numbers, "beta")

    def prompt(self, row: int) -> str:
        """A prompt by its row in the numbers."""
        found = at(self.numbers, "per_prompt", row, "prompt")
        return f"prompt {row}" if found is None else str(found) or EMPTY

    def of(self, side: str, name: str) -> Shaped[np.ndarray, "..."] | None:
        """One value per sample of a side."""
        return self.samples.get(f"{side}.{name}")


def read_subject(folder: Path) -> Subject:
    """Read an evaluation's folder, or that of the run which holds it in `eval/`.

    Raises:
        EvaluationFileError: there is no metrics.json, it is damaged, or of another schema than this version reads.
    """
    folder = folder.expanduser()
    if not (folder / NUMBERS).is_file() and (folder / "eval" / NUMBERS).is_file():
        folder = folder / "eval"
    numbers = read_evaluation(folder)
    missing: list[str] = []
    samples = _samples(folder / SAMPLES, missing)
    pictures = _pictures(folder, missing)
    sheet = None if pictures or not (folder / SHEET).is_file() else _picture(folder / SHEET, {}, missing)
    return Subject(folder, numbers, samples, pictures, sheet, _training(folder, numbers, missing), tuple(missing))


def _samples(path: Path, missing: list[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    if not path.is_file():
        missing.append(f"{path.name} is not there: no histograms.")
        return {}
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        missing.append(f"{path.name} is damaged ({error}): no histograms.")
        return {}


def _pictures(folder: Path, missing: list[str]) -> tuple[Picture, ...]:
    """The pictures that are named and whole; each of the others is said."""
    path = folder / PICTURES
    if not path.is_file():
        missing.append(f"{PICTURES} is not there: no pictures of single samples.")
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(rows, list)
    except (ValueError, AssertionError) as error:
        missing.append(f"{PICTURES} is damaged ({error}): no pictures of single samples.")
        return ()
    found = [_picture(folder / str(at(row, "file")), row, missing) for row in rows]
    return tuple(picture for picture in found if picture is not None)


def _picture(path: Path, row: Mapping[str, Any], missing: list[str]) -> Picture | None:
    """The file as it is, once it is known to open: a page with a broken picture is worse than one that says so."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
            (width, height), kind = image.size, FORMATS[image.format or ""]
            image.load()
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        missing.append(f"The picture {path.name} is not shown: {error}.")
        return None
    judges = {str(name): score for name, score in (row.get("judges") or {}).items() if isinstance(score, int | float)}
    return Picture(
        content,
        kind,
        width,
        height,
        side=str(row.get("side", "posterior")),
        prompt=int(row.get("prompt") or 0),
        index=int(row.get("index") or 0),
        reward=number(row, "reward"),
        judges=judges,
        why=str(row.get("why", "pair")),
    )


def _training(folder: Path, numbers: Mapping[str, Any], missing: list[str]) -> tuple[dict[str, Any], ...]:
    """Rows of the run's metrics.jsonl, which lies beside the evaluation or where the numbers say."""
    places = [folder.resolve().parent, Path(str(at(numbers, "subject", "path") or folder)).expanduser()]
    path = next((place / METRICS for place in places if (place / METRICS).is_file()), None)
    if path is None:
        if at(numbers, "subject", "kind") == "run":
            missing.append(f"{METRICS} of the run is not there: no training curves, no frontier over checkpoints.")
        return ()
    rows, damaged = read_rows(path)
    if damaged:
        missing.append(f"{damaged} lines of {METRICS} could not be read.")
    return tuple(rows.values())
