"""How large the trajectories become that a run's behaviours remember per prompt; what cannot fit is refused before it is drawn."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from diffusion_rtb.chain.recordable import steps_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.whole import size_text
from diffusion_rtb.interfaces import Objective, Prior, WarmsUp

__all__ = ["Store", "check_room", "stores"]

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture

DENSITIES = 3 * 8
"""Bytes of the log-densities of a stored transition: under the prior, when it was drawn, and under the chain that drew it."""


@dataclass(frozen=True)
class Store:
    """What one behaviour remembers."""

    key: str
    """The setting that bounds it."""
    count: int
    """Trajectories per prompt."""
    each: int
    """Bytes of one."""
    prompts: int
    """Prompts for which the run comes to store some."""
    most: int | None = None
    """Trajectories that the run draws for it in all; None: as many as fill it."""

    @property
    def size(self) -> int:
        """Bytes in all, at the end of the run."""
        full = self.count * self.prompts
        return self.each * (full if self.most is None else min(full, self.most))


def stores(config: RunConfig, prior: Prior, objective: Objective, mixture: Mixture) -> list[Store]:
    """The stores of a run.

    A trajectory of T steps has T + 1 states. A prompt that never has its turn stores none, unless the objective warms up on all.
    """
    train, texts = config.train, config.prompts.texts()
    state = math.prod(prior.dims) * _itemsize(prior)
    steps = steps_of(prior.arguments(texts[:1])) or 1  # as if it were one where the call does not say
    chain = (steps + 1) * state + steps * DENSITIES
    turns = train.iterations * train.prompts_per_iteration
    drawn = min(len(texts), turns)
    warmed = len(texts) if isinstance(objective, WarmsUp) else drawn
    _, own = next(iter(mixture.values()))
    found = []
    for source, count in mixture.values():
        kept = source.kept(own, count)
        if kept is not None and count > 0:
            each, most = state if kept.last_state_only else chain, kept.each_turn and kept.each_turn * turns
            prompts = warmed if kept.each_turn is None else drawn
            found.append(Store(kept.setting, kept.count, each, prompts, most))
    return found


def check_room(config: RunConfig, prior: Prior, objective: Objective, mixture: Mixture, folder: Path) -> None:
    """Refuse stores that fit neither the memory nor the disk.

    Full, they are held twice in memory while a checkpoint is written. Their files hold up to twice what is remembered, and may be
    there beside new ones until the last checkpoint that refers to them is gone.
    """
    found = stores(config, prior, objective, mixture)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(place).free
    _fit(found, memory, 2, "It is held twice while a checkpoint is written, and {} of memory are free")
    _fit(found, disk, 3, "Its files come to up to three times that, and {} of disk are free")


def _fit(found: Sequence[Store], free: int, times: int, why: str) -> None:
    needed = sum(store.size for store in found)
    if times * needed <= free:
        return
    said = "; ".join(
        f"{store.key} keeps up to {store.count} trajectories of {size_text(store.each)} for each of {store.prompts} prompts"
        for store in found
    )
    largest = max(found, key=lambda store: store.size)
    fitting = (free // times - needed + largest.size) // (largest.each * largest.prompts)
    remedy = f"Lower {largest.key} to {fitting}" if fitting > 0 else "Take it out of behaviours"
    raise ValueError(
        f"{said}: {size_text(needed)} in all. {why.format(size_text(free))}. {remedy}, or train on fewer prompts."
    )


def _itemsize(prior: Prior) -> int:
    """Bytes of one number of a state."""
    dtype = getattr(torch, str(prior.fingerprint().get("dtype", "")).removeprefix("torch."), torch.float32)
    return int(dtype.itemsize) if isinstance(dtype, torch.dtype) else 4
