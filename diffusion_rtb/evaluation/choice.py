"""Which of a run's prompts an evaluation measures, and which of those it pictures and lists: bounded however many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.config.prompts import PromptTable
from diffusion_rtb.config.sections import EvalConfig

__all__ = ["LISTED", "PICTURED", "evaluated", "evaluated_rows", "listed", "spread"]

PICTURED = 16
"""Prompts with a row of pictures, at most."""

LISTED = 20
"""Prompts with a line on the terminal, at most."""


def evaluated(held: EvalConfig, table: PromptTable) -> tuple[list[int], PromptTable]:
    """The prompts that are evaluated of a run's: by their rows in its table, and as a table of their own.

    Those of `eval.unseen` are numbered from 0 as well: each has the seeds of the run's prompt in its place.

    Raises:
        ValueError: see `evaluated_rows`; or an unseen prompt is one of the run's.
    """
    if held.unseen is not None:
        seen = next((text for text in held.unseen if text in table.texts), None)
        if seen is not None:
            raise ValueError(f"eval.unseen: {seen!r} is a prompt of the run; take it out, or use eval.prompts.")
        return list(range(len(held.unseen))), PromptTable.of(held.unseen)
    rows = evaluated_rows(held.prompts, table.texts)
    return rows, PromptTable(tuple(table.texts[row] for row in rows), tuple(table.metadata[row] for row in rows))


def evaluated_rows(wanted: int | Sequence[str] | None, texts: Sequence[str]) -> list[int]:
    """Rows of the run's prompt table: all; so many, evenly spread over it; or those of certain prompts, in its order.

    Raises:
        ValueError: more than there are, or a prompt that the run does not have.
    """
    if wanted is None:
        return list(range(len(texts)))
    if isinstance(wanted, int):
        if wanted > len(texts):
            raise ValueError(f"eval.prompts is {wanted}: the run has {len(texts)} prompts. Lower it, or null for all.")
        return spread(len(texts), wanted)
    known = {text: row for row, text in enumerate(texts)}
    unknown = next((text for text in wanted if text not in known), None)
    if unknown is not None:
        raise ValueError(f"eval.prompts: the run has no prompt {unknown!r}.{nearest(unknown, known)}")
    return sorted({known[text] for text in wanted})


def spread(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total` at even distances, all of them if there are no more; the first is 0."""
    return [k * total // count for k in range(count)] if count < total else list(range(total))


def listed(per_prompt: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the terminal shows of the numbers of many prompts: those whose reward rose most, then those where it rose least."""
    if len(per_prompt) <= LISTED or "reward" not in per_prompt[0]:
        return list(per_prompt)
    ranked = sorted(per_prompt, key=_rise, reverse=True)
    return ranked[: LISTED // 2] + ranked[-LISTED // 2 :]


def _rise(row: Mapping[str, Any]) -> float:
    reward = row["reward"]
    return float(reward["posterior"]["mean"] - reward["prior"]["mean"])
