"""What may change in a config once a run was trained with it, and how the rest is shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from diffusion_rtb.config.load import RunConfig, config_diff

__all__ = ["MAY_CHANGE", "changes", "may_change"]

MAY_CHANGE = (
    "name",
    "out",
    "eval",
    "watch",
    "train.iterations",
    "train.rounding_share",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.grid_every",
    "train.grid_samples",
    "train.tracker",
    "train.process_timeout",
    "train.micro_batch",
    "prior.decode_batch",
    "prior.memory",
)
"""Keys, or sections, that change no number of the iterations done: where a run lies, how long it is, what is kept and shown, and
how much is in memory at once."""

NOTHING = object()


def may_change(key: str) -> bool:
    """Whether a dotted key is in MAY_CHANGE."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def changes(before: RunConfig, now: RunConfig, *, also: Sequence[str] = ()) -> list[str]:
    """One line for each key that differs and must not: `key: old there, new now`.

    Args:
        before: Of the run.
        now: Asked for.
        also: Further keys that may differ.
    """
    differing = config_diff(before, now)
    return [f"  {_line(key, *pair)}" for key, pair in differing.items() if not may_change(key) and key not in also]


def _line(key: str, old: Any, new: Any) -> str:
    if not (isinstance(old, list) and isinstance(new, list)):
        return "{}: {} there, {} now".format(key, *_short(old, new))
    pairs = enumerate(zip_longest(old, new, fillvalue=NOTHING))
    first, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    count = "" if len(old) == len(new) else f" (there {len(old)} items, now {len(new)})"
    return "{}[{}]: {} there, {} now{}".format(key, first, *_short(a, b), count)


def _short(old: Any, new: Any, limit: int = 60) -> tuple[str, str]:
    """Both values, long ones cut to the surroundings of the first difference."""
    texts = ["nothing" if value is NOTHING else repr(value) for value in (old, new)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = 0 if max(map(len, texts)) <= limit else max(0, same - limit // 3)
    return tuple(_cut(text, start, limit) for text in texts)  # type: ignore[return-value]


def _cut(text: str, start: int, limit: int) -> str:
    shown = text[start : start + limit]
    return f"{'…' if start else ''}{shown}{'…' if start + limit < len(text) else ''}"
