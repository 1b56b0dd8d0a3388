"""The files of an evaluation, for pages and programs: numbers, one row per sample, and the pictures that are shown.

    metrics.json          the numbers, by `metrics.schema.json`
    samples.safetensors   of each side, one value per sample: SIDE.prompt, SIDE.index, SIDE.reward, SIDE.judge.NAME, ...
    pictures.json         what is in pictures/: side, prompt, index, reward, judges, and why it is shown
    side_by_side.png      pairs at equal noise on one sheet

Each appears whole or not at all; metrics.json is the last one, so that where it is there, all is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_rtb.evaluation.samples import Drawn, Pictured
from diffusion_rtb.files.evaluations import NUMBERS
from diffusion_rtb.files.pictures import save_png, to_pil
from diffusion_rtb.files.whole import whole, write_json

__all__ = ["PICTURES", "SAMPLES", "sample_tensors", "write_evaluation"]

SAMPLES, PICTURES = "samples.safetensors", "pictures"

OURS = re.compile(r"(prior|posterior)-\d{4,}-\d{3,}\.png")
"""Names in pictures/; an evaluation replaces those of the one before."""

Sides = Mapping[str, tuple[Drawn, Pictured]]
"""`prior` and `posterior`, or the posterior alone."""


def write_evaluation(folder: Path, numbers: Mapping[str, Any], sides: Sides) -> None:
    """Write all files but the sheet.

    Raises:
        DiskError: there is no room; it names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / SAMPLES) as unfinished:
        save_file(sample_tensors({side: drawn for side, (drawn, _) in sides.items()}), unfinished)
    _write_pictures(folder, sides, len(numbers["per_prompt"]))
    write_json(folder / NUMBERS, numbers)


def sample_tensors(sides: Mapping[str, Drawn]) -> dict[str, Tensor]:
    """One value per sample, or one per step of it, by name; `SIDE.log_ratio` is log q - log p of each step, nats."""
    found: dict[str, Tensor] = {}
    for side, drawn in sides.items():
        index = torch.arange(len(drawn)) if drawn.index is None else drawn.index
        values = {"prompt": drawn.prompt, "index": index, "reward": drawn.reward}
        if drawn.log_q is not None and drawn.log_p is not None:
            values["log_ratio"] = (drawn.log_q.double() - drawn.log_p.double()).float()
        values |= {f"judge.{name}": scores for name, scores in (drawn.judges or {}).items()}
        values |= dict(drawn.scores or {})
        found |= {f"{side}.{name}": value.contiguous() for name, value in values.items()}
    return found


def _write_pictures(folder: Path, sides: Sides, prompts: int) -> None:
    rows: list[dict[str, Any]] = []
    levels: dict[str, Tensor] = {}
    for side, (drawn, pictured) in sides.items():
        if pictured.image.dtype != torch.uint8:
            continue  # vectors are dots on the sheet
        groups = {"pair": pictured.pairs(prompts)}
        if side == "posterior":
            groups |= {"best": pictured.extremes(best=True), "worst": pictured.extremes(best=False)}
        for why, group in groups.items():
            found = [_row(side, why, group, i, drawn) for i in range(len(group))]
            rows += found
            levels |= {row["file"]: group.image[i] for i, row in enumerate(found)}
    for file, image in levels.items():
        save_png(to_pil(image / 255), folder / file)
    write_json(folder / "pictures.json", rows)
    for path in (folder / PICTURES).glob("*.png"):
        if OURS.fullmatch(path.name) and f"{PICTURES}/{path.name}" not in levels:
            path.unlink()


def _row(side: str, why: str, group: Pictured, i: int, drawn: Drawn) -> dict[str, Any]:
    prompt, index = int(group.prompt[i]), int(group.index[i])
    assert drawn.index is not None
    place = int(((drawn.prompt == prompt) & (drawn.index == index)).nonzero()[0])
    return {
        "file": f"{PICTURES}/{side}-{prompt:04d}-{index:03d}.png",
        "side": side,
        "prompt": prompt,
        "index": index,
        "reward": float(group.reward[i]),
        "judges": {name: float(scores[place]) for name, scores in (drawn.judges or {}).items()},
        "why": why,
    }
