"""What the command was asked for, as parts and a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_rtb.benchmark.plan import DTYPES, Model, Part, chosen, load_models, plan
from diffusion_rtb.config.component_errors import nearest

__all__ = ["Asked", "choose"]

SMALL = ("emoji",)
"""What a CPU bears; the others take hours there."""


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; empty means the default."""

    models: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    parts: Sequence[str] = ()
    """These are measured again."""
    seconds: float = 480.0
    part_seconds: float = 120.0
    device: str | None = None
    file: Path | None = None
    """Of models of one's own."""


def choose(asked: Asked) -> tuple[list[Part], torch.device]:
    """The parts that were asked for, in the order of the plan, and where to measure them.

    Raises:
        ValueError: there is no such model, dtype, part or device.
    """
    device = _device(asked.device)
    parts = plan(_models(asked, device), _dtypes(asked, device))
    return (chosen(parts, asked.parts) if asked.parts else parts), device


def _device(name: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one.

    Raises:
        ValueError: torch does not know it, or does not see it here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: torch knows no such device; write for example cpu or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; leave it out, or write cpu.")
    return device


def _models(asked: Asked, device: torch.device) -> Mapping[str, Model]:
    known = load_models(asked.file)
    if asked.file is not None and not asked.models:
        return known
    small = device.type == "cpu"
    default = [name for name in known if (name in SMALL) == small]
    for name in asked.models:
        if name not in known:
            raise ValueError(f"There is no model {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return {name: known[name] for name in asked.models or default}


def _dtypes(asked: Asked, device: torch.device) -> Sequence[str]:
    for name in asked.dtypes:
        if name not in DTYPES:
            raise ValueError(f"There is no dtype {name!r} here.{nearest(name, DTYPES)} Known: {', '.join(DTYPES)}.")
    if device.type == "cuda":
        return asked.dtypes or DTYPES
    if "tf32" in asked.dtypes:
        raise ValueError(f"--dtype tf32 is a mode of CUDA devices, and this is {device}: leave it out.")
    return asked.dtypes or [name for name in DTYPES if name != "tf32"]
