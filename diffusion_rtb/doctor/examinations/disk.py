"""What the run writes, against what is free where it writes."""

from __future__ import annotations

import io
import shutil

from diffusion_rtb.behaviours._stored_size import stores
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.sizes import module_bytes
from diffusion_rtb.doctor.words import many
from diffusion_rtb.files.pictures import grid
from diffusion_rtb.files.whole import size_text
from diffusion_rtb.training.observers import PROMPTS
from diffusion_rtb.training.rounding_floor import trained_networks

__all__ = ["PLACE", "examine"]

PLACE = 80

ROW = 1500
"""Bytes of a line of metrics.jsonl, about."""

FILES = 2
"""Files of a memory hold up to this many times what is remembered (`run/memories.py`)."""

NEAR = 0.8
"""Share of the free disk above which it is worth a look."""


def examine(patient: Patient) -> Examined:
    """Checkpoints, memories, sheets and the exported posterior, at the end of the run."""
    train, dry = patient.config.train, patient.dry
    one = sum(dry.checkpoint.values())
    kept = stores(patient.config, patient.loaded.prior, patient.loaded.objective, patient.mixture)
    sheets = train.iterations // train.grid_every if train.grid_every else 0
    parts = {
        "checkpoints": one * (train.keep_checkpoints + 1),
        "behaviours' memories": FILES * sum(store.size for store in kept),
        "sample sheets": sheets * _sheet(patient) if sheets else 0,
        "exported posterior": _exported(patient, dry.checkpoint["posterior"]),
        "metrics": ROW * train.iterations,
    }
    notes = {
        "checkpoints": f"{size_text(one)} each, {train.keep_checkpoints} kept and one that is being written",
        "sample sheets": many(sheets, "sheet"),
    }
    rows = [
        (name, size_text(size) + (f"  {notes[name]}" if name in notes else "")) for name, size in parts.items() if size
    ]
    needed = sum(parts.values())
    place = next(path for path in (patient.folder.absolute(), *patient.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    numbers = {
        "parts": parts,
        "checkpoint": one,
        "needed": needed,
        "free": free,
        "checkpoint_files": dict(dry.checkpoint),
    }
    return Examined([_judged(needed, free, str(patient.folder))], rows, numbers, cost=f"{size_text(needed)} of disk")


def _judged(needed: int, free: int, place: str) -> Finding:
    text = f"{size_text(needed)} at the end, {size_text(free)} are free where {place} is"
    remedy = "out=A_FOLDER_ON_A_LARGER_DISK, a smaller capacity of the behaviours, or train.keep_checkpoints=1"
    if needed > free:
        return Finding("stop", text, remedy)
    return Finding("look", text, remedy) if needed > NEAR * free else Finding("ok", text)


def _exported(patient: Patient, trained: int) -> int:
    """Bytes of the trained networks whole, as the prior has them; of adapters twice, for diffusers and for others."""
    prior = patient.loaded.prior
    if "full" not in (prior.fingerprint().get("adapter") or {}):
        return 2 * trained
    return module_bytes(*trained_networks(prior)) - trained


def _sheet(patient: Patient) -> int:
    """Bytes of one sheet, by one of the same size with what pictures there are."""
    train, batch = patient.config.train, patient.samples
    assert batch.images is not None
    rows, columns = min(PROMPTS, len(patient.config.prompts.texts())), train.grid_samples
    chosen = [k % len(batch) for k in range(rows * columns)]
    picture = grid(batch.images[chosen], columns, captions=["0.00"] * len(chosen), rows=["a prompt"] * rows)
    with io.BytesIO() as file:
        picture.save(file, format="PNG")
        return file.tell()
