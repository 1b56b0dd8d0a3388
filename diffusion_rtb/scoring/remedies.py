"""Why a reward of somebody's does not run here: written for PIL pictures, for levels of 0 to 255, for another order of arguments.

An exception often says so by what it looked for (`remedy`). Where it does not, the reward is asked with two samples in the other
form: if that runs, that is what it was written for (`other_form`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_rtb.scoring.metadata import takes_metadata

__all__ = ["ORDER", "other_form", "remedy", "texts_first"]

HERE = "images are float tensors (batch, 3, height, width) in [0, 1]"
PICTURES = f"{HERE}: for PIL pictures use [torchvision.transforms.functional.to_pil_image(x) for x in images.cpu()]"
ARRAYS = f"{HERE}: for numpy use images.cpu().numpy()"
LEVELS = f"{HERE}: for 8-bit levels use (images * 255).round().to(torch.uint8)"
ORDER = "a reward is called with (images, prompts), in this order"
ROWS = (
    "it takes `metadata`, and the prompt has none of that name: prompts.file may be a .jsonl or .csv with it; check-reward has "
    "it from --prompt-file FILE, --prior CONFIG, or --images FOLDER with a metadata.jsonl"
)

TEXTS = ("prompts", "prompt", "captions", "caption", "texts", "text")


def remedy(error: BaseException, reward: Any, metadata: Sequence[Mapping[str, Any]] = ()) -> str:
    """What to do about an exception of a reward, as " (...)"; nothing where its cause is not known.

    Args:
        error: What the reward raised.
        reward: The reward.
        metadata: What it was given, if it takes that.
    """
    found = _by_attribute(error) if isinstance(error, AttributeError) else _by_message(error)
    if found is None and isinstance(error, KeyError) and takes_metadata(reward):
        key = error.args[0] if error.args else None
        found = ROWS if not all(key in row for row in metadata) or not metadata else None
    return f" ({found})" if found else ""


def _by_attribute(error: AttributeError) -> str | None:
    """An attribute that only another kind of object has says what was expected."""
    wanted = error.name or ""
    if isinstance(error.obj, Tensor):
        if wanted == "__array_interface__" or hasattr(Image.Image, wanted):
            return PICTURES
        if hasattr(str, wanted):
            return ORDER
        return ARRAYS if hasattr(np.ndarray, wanted) else None
    if isinstance(error.obj, list | str) and hasattr(Tensor, wanted):
        return ORDER
    return None


def _by_message(error: BaseException) -> str | None:
    said = str(error)
    if "PIL" in said or "pic should be" in said or "Cannot handle this data type" in said:
        return PICTURES
    if isinstance(error, TypeError | RuntimeError) and any(word in said for word in ("uint8", "Byte", "ByteTensor")):
        return LEVELS
    if isinstance(error, TypeError) and "list indices must be integers" in said:
        return ORDER
    return None


def other_form(reward: Callable[..., Any], images: Tensor, prompts: Sequence[str]) -> str:
    """In which other form two of the samples are taken by a reward that fails, as " (...)"; nothing if in none."""
    if images.ndim != 4:
        return ""
    images, prompts = images[:2].detach().cpu(), list(prompts[:2])
    levels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = levels.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    for told, arguments in (
        (f"with PIL pictures it runs, but {PICTURES}", (pictures, prompts)),
        (f"with prompts and images exchanged it runs: {ORDER}", (prompts, images)),
        (f"with 8-bit levels it runs, but {LEVELS}", (levels, prompts)),
        (f"with numpy arrays it runs, but {ARRAYS}", (arrays, prompts)),
    ):
        if _runs(reward, *arguments):
            return f" ({told})"
    return ""


def texts_first(reward: Any) -> bool:
    """Whether the parameters' names say that a reward takes prompts first and images second."""
    try:
        names = list(inspect.signature(reward).parameters)
    except (TypeError, ValueError):
        return False
    return len(names) > 1 and names[0].lower() in TEXTS and names[1].lower() not in TEXTS


def _runs(reward: Callable[..., Any], first: Any, second: Any) -> bool:
    rows: tuple[Any, ...] = ([{}, {}],) if takes_metadata(reward) else ()
    try:
        with torch.no_grad():
            reward(first, second, *rows)
    except (Exception, SystemExit):  # noqa: BLE001 — it is only tried
        return False
    return True
