"""Pairs of pictures that somebody has compared: a folder, with a file that says which of the two is better for which prompt."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import Encodes
from diffusion_rtb.behaviours._source import Share, Source
from diffusion_rtb.chain.rollout import rollout
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.prompt_files import decoded, json_object
from diffusion_rtb.files.real_images import read_image, several_sizes
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, occurrences

__all__ = ["Pairs"]

COLUMNS = ("image_w", "image_l", "prompt")


@dataclass(frozen=True)
class Pair:
    """One row."""

    better: Path
    worse: Path
    prompt: str


class Pairs(Source):
    """The better and the worse picture of a pair of each prompt, as latents; their rewards are 1 and 0, their order and no more.

    The file has columns image_w, image_l and prompt; paths count from the folder. All pictures are of one size, the prior's. A pair
    is drawn anew in each iteration. For objectives that read the order alone: `diffusion_dpo`, which then leaves the posterior's
    own samples alone with `own: false`.

    Args:
        share: Of each prompt's group: two samples of it.
        folder: Where the pictures are.
        metadata: The file in it, .csv or .jsonl.

    Raises:
        ValueError: a file is missing, damaged or of another size, a column is missing, or the share is not that of two samples.
    """

    name = "pairs"
    ranked = True
    density_unknown = "for pictures from elsewhere. Take pairs out"

    def __init__(self, share: Share, folder: str, metadata: str = "metadata.csv") -> None:
        self.share, self.folder = share, Path(folder).expanduser()
        self.pairs = read_pairs(self.folder / metadata, self.folder)
        self.encoded: dict[Path, Tensor] = {}
        self.schedule: Trajectory | None = None

    def prepare(self, seed: int, group: int) -> None:
        """See `Source`; ValueError: the share is not that of one pair."""
        super().prepare(seed, group)
        if round(self.share * group) != 2:
            raise ValueError(
                f"pairs draws the two pictures of a pair for each prompt, and its share {self.share:g} of train.group {group} is "
                f"{self.share * group:g}: set it to {2 / group:.6g}."
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError: one has no pair."""
        known = {pair.prompt for pair in self.pairs}
        lacking = [prompt for prompt in prompts if prompt not in known]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of the run's {len(prompts)} prompts have no pair in {self.folder}, the first is {lacking[0]!r}: "
                "take them out of `prompts`, or add pairs."
            )

    def draw(self, sampler: Sampler, rows: Sequence[int], count: int, iteration: int, beta: float) -> Batch:
        """See `Source`; of each chain only x_0 is one, its states are noise-free copies until they are noised."""
        turns = zip(rows, occurrences(rows), strict=True)
        places = [place for row, nth in turns for place in self._pair(sampler, row, nth, iteration)]
        x_0 = torch.stack([self._latents(sampler, place) for place in places])
        chain = self._schedule(sampler)
        zero = torch.zeros(len(x_0), chain.steps, dtype=torch.float64)
        trajectory = Trajectory(
            x_0[:, None].repeat(1, chain.steps + 1, *[1] * (x_0.ndim - 1)), chain.timesteps, chain.std, zero
        )
        prompt = torch.tensor([row for row in rows for _ in range(2)])
        return Batch(trajectory, prompt, torch.tensor([1.0, 0.0]).repeat(len(rows)))

    def _pair(self, sampler: Sampler, row: int, nth: int, iteration: int) -> tuple[Path, Path]:
        mine = [pair for pair in self.pairs if pair.prompt == sampler.prompts[row]]
        generator = torch.Generator().manual_seed(seed_of(self.seed, "pairs", iteration, row, nth))
        pair = mine[int(torch.randint(len(mine), (), generator=generator))]
        return pair.better, pair.worse

    def _latents(self, sampler: Sampler, path: Path) -> Float[Tensor, "*dims"]:
        """x_0 of a picture, on the host; encoded once."""
        if path not in self.encoded:
            assert isinstance(sampler.prior, Encodes)
            self.encoded[path] = sampler.prior.latents_of(read_image(path)[None])[0].cpu()
        return self.encoded[path]

    def _schedule(self, sampler: Sampler) -> Trajectory:
        """A chain of the prior, for its timesteps and deviations."""
        if self.schedule is None:
            with sampler.prior.as_prior():
                self.schedule = rollout(sampler.prior, sampler.prompts[:1], [0], needs_noise=sampler.needs_noise).to(
                    "cpu"
                )
        return self.schedule


def read_pairs(file: Path, folder: Path) -> list[Pair]:
    """The rows of a metadata file; of pictures only the headers are read; ValueError: see `Pairs`."""
    if not file.is_file():
        raise ValueError(f"pairs: there is no file {file}; it has the columns {', '.join(COLUMNS)}, as .csv or .jsonl.")
    found = [_pair(row, number, file, folder) for number, row in _rows(file)]
    if not found:
        raise ValueError(f"pairs: {file} has no rows.")
    if sizes := several_sizes(dict.fromkeys(path for pair in found for path in (pair.better, pair.worse))):
        raise ValueError(f"pairs: the pictures of {file} are of {sizes}: resize or crop them to the prior's.")
    return found


def _rows(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """With their line numbers."""
    text, kind = decoded(file), file.suffix.lower()
    if kind == ".csv":
        return list(enumerate(csv.DictReader(io.StringIO(text)), 2))
    if kind == ".jsonl":
        return [
            (number, json_object(line, f"{file}, line {number}"))
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    raise ValueError(f"pairs: {file} is neither .csv nor .jsonl; save it as one of them.")


def _pair(row: Mapping[str, Any], number: int, file: Path, folder: Path) -> Pair:
    lacking = [name for name in COLUMNS if not isinstance(row.get(name), str) or not row[name].strip()]
    if lacking:
        raise ValueError(
            f"pairs: {file}, line {number}: no {' and no '.join(lacking)}; it has {', '.join(map(str, row))}."
        )
    better, worse = folder / row["image_w"], folder / row["image_l"]
    for path in (better, worse):
        if not path.is_file():
            raise ValueError(f"pairs: {file}, line {number}: there is no picture {path}.")
    if better == worse:
        raise ValueError(f"pairs: {file}, line {number}: image_w and image_l are the same picture, {better}.")
    return Pair(better, worse, row["prompt"])
