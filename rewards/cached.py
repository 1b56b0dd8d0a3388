"""A slow reward, asked once per image and prompt."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.scoring.memory import stateful_rewards
from rewards._nested import Nested, inner_values

__all__ = ["Cached"]


class Cached(Nested):
    r"""r(x) = r_inner(x), remembered under a hash of the image's numbers, its shape, its dtype, its prompt
    and, if r_inner takes it, the prompt's metadata.

    It pays where the same images come again: an evaluation repeated at the same seeds, a prior that is sampled anew by each
    run of a sweep. The inner reward sees only images that are new, each once; it must not depend on the rest of the batch.

    Args:
        reward: The inner reward, `{component: NAME, argument: value}`.
        size: Values kept in memory, the latest used.
        file: An SQLite file in which values outlive the process; several may share it. Values are stored under the inner
            reward's arguments as well, but not under its weights: delete the file when weights change behind the same path.
    """

    no_gradient = "it remembers numbers, not how they came about: name the inner reward itself"

    def __init__(self, reward: Mapping[str, Any], *, size: int = 100_000, file: str | None = None) -> None:
        if size < 1:
            raise ValueError(f"size is {size}: at least 1 value must be kept.")
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"There is no folder {Path(file).absolute().parent} for the cache {file}; make it first."
            )
        super().__init__([reward])
        (self.name,) = self.inner
        self.size = size
        self._memory: OrderedDict[bytes, float] = OrderedDict()
        self._path = None if file is None else Path(file)
        self._salt = json.dumps(dict(reward), sort_keys=True, default=str).encode()

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """The inner reward; ValueError where its values do not stay."""
        reward = self.inner[self.name].build()
        if stateful_rewards(reward):
            raise ValueError(
                f"The values of {self.name!r} change as it learns, so they cannot be remembered: put `cached` inside it, "
                "around the reward that it learns from."
            )
        return {self.name: reward}

    @cached_property
    def _file(self) -> _File | None:
        return None if self._path is None else _File(self._path)

    def load_weights(self) -> None:
        _ = self.rewards, self._file

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch *dims"], prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Float[Tensor, " batch"]:
        rows = list(metadata) if self.takes_metadata and metadata is not None else [{}] * len(prompts)
        keys = [self._key(*one) for one in zip(images, prompts, rows, strict=True)]
        found = self._known(set(keys))
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}  # the first place of each
        places = sorted(new.values())
        if places:
            texts, known = [prompts[i] for i in places], [rows[i] for i in places]
            values = inner_values(self.rewards[self.name], images[places], texts, self.name, known)
            fresh = dict(zip((keys[i] for i in places), values.tolist(), strict=True))
            if self._file is not None:
                self._file.write(fresh)
            found |= fresh
        self._remember(keys, found)
        return torch.tensor([found[key] for key in keys], dtype=torch.float32, device=images.device)

    def _key(self, image: Tensor, prompt: str, metadata: Metadata) -> bytes:
        pixels = image.detach().cpu().contiguous()
        digest = hashlib.blake2b(self._salt, digest_size=16)
        told = [prompt, dict(metadata)] if metadata else [prompt]
        digest.update(json.dumps([str(pixels.dtype), list(pixels.shape), *told], sort_keys=True).encode())
        digest.update(pixels.flatten().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    def _known(self, keys: set[bytes]) -> dict[bytes, float]:
        found = {key: self._memory[key] for key in keys if key in self._memory}
        return found if self._file is None else found | self._file.read(keys - found.keys())

    def _remember(self, keys: Sequence[bytes], values: Mapping[bytes, float]) -> None:
        for key in keys:
            self._memory[key] = values[key]
            self._memory.move_to_end(key)
        while len(self._memory) > self.size:
            self._memory.popitem(last=False)


class _File:
    """Values on disk; each call opens the file anew, so that forked processes and threads share no connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained(), closing(self._open()) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS reward (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID")

    def read(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        with self._explained(), closing(self._open()) as file:
            rows = [file.execute("SELECT key, value FROM reward WHERE key = ?", (key,)).fetchone() for key in keys]
        return {row[0]: row[1] for row in rows if row is not None}

    def write(self, values: Mapping[bytes, float]) -> None:
        assert all(map(math.isfinite, values.values()))
        with self._explained(), closing(self._open()) as file, file:
            file.executemany("INSERT OR REPLACE INTO reward VALUES (?, ?)", values.items())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the file: full disks, damage, and others that keep it locked for a minute come as exceptions of their own class."""
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(
                f"{self.path} cannot be used as a cache ({error}). Check that it is writable and has room; if it is "
                "damaged, delete it, or name another file."
            ) from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)
