"""What was measured of one sampler, on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.comparison.truths.truth import PICTURED, Result
from diffusion_rtb.files.whole import whole, write_json
from diffusion_rtb.run.metrics_file import read_rows

__all__ = ["CURVE", "held", "read_lines", "write"]

MEASURES, SAMPLES, CURVE = "measures.json", "samples.safetensors", "curve.jsonl"


def write(folder: Path, numbers: Mapping[str, Any], x: Tensor) -> None:
    """The samples first: where there are measures, everything is there."""
    with whole(folder / SAMPLES) as unfinished:
        save_file({"x": x[:PICTURED].float().contiguous()}, unfinished)
    write_json(folder / MEASURES, numbers)


def held(folder: Path) -> Result | None:
    """What was measured; None where there is nothing, or nothing readable any more: measured again, it is the same."""
    try:
        numbers = dict(json.loads((folder / MEASURES).read_text(encoding="utf-8")))
        samples = load_file(folder / SAMPLES)["x"]
    except (FileNotFoundError, ValueError, TypeError, SafetensorError, KeyError):
        return None
    return Result(numbers, read_lines(folder / CURVE), samples)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of looks; [] where there is none. A line that a kill cut off is left out."""
    rows, _ = read_rows(path)
    return [{name: value for name, value in row.items() if value is not None} for row in rows.values()]
