"""A folder of pictures that any tool has made, alone or against one of its prior's; what needs log-densities is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config.components import Described, describe
from diffusion_rtb.config.load import ConfigError, RunConfig, load_config, load_eval
from diffusion_rtb.config.prompts import Metadata, PromptTable, check_prompt
from diffusion_rtb.config.recipe import component_name
from diffusion_rtb.config.sections import Component
from diffusion_rtb.config.yaml_text import read_yaml
from diffusion_rtb.evaluation.choice import evaluated_rows
from diffusion_rtb.evaluation.samples import Drawn, Seen, Side
from diffusion_rtb.evaluation.subject import Loaded, Options, Subject, folder_of
from diffusion_rtb.files.image_folder import METADATA, ImageFolder, ImageFolderError, read_image_folder
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.whole import check_writable, clear_unfinished
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.run.checks import describe_tools
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.scoring.prompts import check_component_prompts

__all__ = ["ImagesSubject"]


class ImagesSubject(Subject):
    """Pictures with their prompts, with the reward of `--config` or `--reward`, against those of `--against` or none.

    Raises:
        ConfigError: nobody says the reward, or an option is wrong.
        ImageFolderError: a folder cannot be read, or both have different prompts or sizes.
    """

    kind = "images"

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        config = None if options.config is None else load_config(options.config, options.all_overrides)
        self.eval = load_eval(options.all_overrides) if config is None else config.eval
        self.reward = _reward(path, config, options)
        self.beta = math.nan if config is None else config.beta.value
        self.held_pictures = read_image_folder(path)
        self.against = None if options.against is None else read_image_folder(options.against)
        _check_pair(self.held_pictures, self.against)
        if self.eval.unseen is not None:
            raise ValueError(
                "eval.unseen names prompts to draw; these pictures are drawn. Leave it out (eval.unseen=null)."
            )
        self.table = _table(self.held_pictures, self.eval.prompts)
        self.pictures = {"posterior": self.held_pictures} | ({} if self.against is None else {"prior": self.against})
        self.orders = _orders(self.pictures, self.table)
        for picture in (self.held_pictures, self.against):
            if picture is not None:
                check_component_prompts(self._component, picture.prompts, picture.metadata)
        every = PromptTable(self.held_pictures.prompts, self.held_pictures.metadata)
        self.tools = describe_tools(self.eval, every)
        self.folder = folder_of(self, options)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a path is of this kind."""
        return path.is_dir() and (path / METADATA).exists()

    @property
    def _component(self) -> Mapping[str, Any]:
        return {"component": self.reward.name, **self.reward.arguments}

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.path.resolve().name

    @property
    def recipe(self) -> str:
        """Whose they are; how they were made nobody said."""
        count = len(self.held_pictures.files)
        against = (
            "" if self.against is None else f" against {len(self.against.files)} of {self.against.path.resolve().name}"
        )
        beta = f", beta {self.beta:.6g}" if math.isfinite(self.beta) else ""
        return f"{count} pictures of {self.name}{against}, reward {component_name(Component(component=self.reward.name))}{beta}"

    @property
    def seeds(self) -> Mapping[str, Any]:
        """How pictures of both folders are paired."""
        if self.against is None:
            return {}
        both = self.held_pictures.seeded and self.against.seeded
        return {
            "pairs": "equal seeds" if both else "the order of their lines; whether their noise is equal is not known"
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        """The pictures themselves, and the reward."""
        digests = [None if held is None else held.digest for held in (self.held_pictures, self.against)]
        return {"images": digests, "reward": dict(self._component), "prompts": self.table.sha256}

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `Subject`."""
        check_writable(self.folder, files=("metrics.json", "side_by_side.png", "timing.json"))
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            clear_unfinished(self.folder)
            yield

    def load(self) -> Loaded:
        """The reward."""
        with doing("loading the reward"):
            reward = self.reward.build()
        sides = {
            name: FolderSide(held, self.orders[name], self.table, reward, self.eval.batch)
            for name, held in self.pictures.items()
        }
        width, height = self.held_pictures.size
        sampling = {"size": [width, height], "images": {name: len(side) for name, side in sides.items()}}
        return Loaded(posterior=sides["posterior"], prior=sides.get("prior"), sampling=sampling)


def _reward(path: Path, config: RunConfig | None, options: Options) -> Described:
    if options.reward is not None:
        given = read_yaml(options.reward)
        return describe({"component": given} if isinstance(given, str) else given, "reward")
    if config is None:
        raise ConfigError(f"{path} is a folder of pictures: say their reward by --reward NAME, or by --config CONFIG.")
    return describe(config.reward, "reward")


def _check_pair(one: ImageFolder, other: ImageFolder | None) -> None:
    if other is None:
        return
    if one.size != other.size:
        sizes = " and ".join(f"{held.path} {held.size[0]} x {held.size[1]}" for held in (one, other))
        raise ImageFolderError(f"The pictures are of different sizes, {sizes} pixels: resize one of the folders.")
    for here, there in ((one, other), (other, one)):
        alone = next((prompt for prompt in here.prompts if prompt not in set(there.prompts)), None)
        if alone is not None:
            raise ImageFolderError(
                f"{here.path} has pictures for the prompt {alone!r}, and {there.path} has none: both sides need the same prompts."
            )


def _table(held: ImageFolder, wanted: int | Sequence[str] | None) -> PromptTable:
    """The different prompts in the order of the lines, with what the first line of each says."""
    first: dict[str, Metadata] = {}
    for number, (prompt, metadata) in enumerate(zip(held.prompts, held.metadata, strict=True), 1):
        check_prompt(prompt, f"{held.path / METADATA}, picture {number}")
        first.setdefault(prompt, metadata)
    texts = list(first)
    rows = evaluated_rows(wanted, texts)
    return PromptTable(tuple(texts[row] for row in rows), tuple(first[texts[row]] for row in rows))


Order = list[list[tuple[int, int]]]
"""Of each prompt the index and the place in the folder of its pictures; equal indices of two folders are pairs."""


def _orders(pictures: Mapping[str, ImageFolder], table: PromptTable) -> dict[str, Order]:
    """Pairs by equal seeds come first, what has no partner has an index of its own; without seeds lines are paired in order.

    Raises:
        ImageFolderError: both folders have seeds, and none in common.
    """
    found: dict[str, Order] = {name: [] for name in pictures}
    seeded = all(held.seeded for held in pictures.values())
    paired = 0
    for text in table.texts:
        places = {name: [i for i, p in enumerate(held.prompts) if p == text] for name, held in pictures.items()}
        common: dict[int | None, int] = {}
        if seeded:
            seeds = [{held.seeds[i] for i in places[name]} for name, held in pictures.items()]
            shared = sorted(seed for seed in set.intersection(*seeds) if seed is not None)
            common = {seed: k for k, seed in enumerate(shared)}
        free = len(common)
        paired += free
        for name, held in pictures.items():
            pairs = [(common[held.seeds[i]], i) for i in places[name] if held.seeds[i] in common]
            alone = [i for i in places[name] if held.seeds[i] not in common]
            found[name].append([*sorted(pairs), *enumerate(alone, free)])
            free += len(alone) if seeded else 0
    if seeded and not paired:
        raise ImageFolderError(
            f"{' and '.join(str(held.path) for held in pictures.values())} have no seed in common, so nothing pairs them: leave "
            "`seed` out to pair their lines by their order."
        )
    return found


class FolderSide(Side):
    """The pictures of a folder, those of one prompt adjacent.

    Args:
        held: The folder.
        order: See `Order`.
        table: The prompts.
        reward: Scores each picture.
        batch: Pictures at once.
    """

    def __init__(self, held: ImageFolder, order: Order, table: PromptTable, reward: Reward, batch: int) -> None:
        self.held, self.reward, self.batch = held, reward, batch
        self.prompts, self.metadata = table.texts, table.metadata
        self.samples = [(row, k, place) for row, places in enumerate(order) for k, place in places]

    def __len__(self) -> int:
        return len(self.samples)

    def known(self, drawn: Drawn) -> list[Metadata]:
        """What the line of each picture says."""
        places = {(row, k): place for row, k, place in self.samples}
        assert drawn.index is not None
        pairs = zip(drawn.prompt.tolist(), drawn.index.tolist(), strict=True)
        return [self.held.metadata[places[pair]] for pair in pairs]

    def batches(self, start: int = 0) -> Iterator[Seen]:
        """See `Side`."""
        name = getattr(self.reward, "__name__", type(self.reward).__name__)
        for first in range(start, len(self.samples), self.batch):
            part = self.samples[first : first + self.batch]
            images = self.held.images([place for _, _, place in part]).to(_device())
            texts, known = (
                [self.prompts[row] for row, _, _ in part],
                [self.held.metadata[place] for _, _, place in part],
            )
            reward = evaluate_reward(self.reward, images, texts, name, metadata=known).cpu()
            prompt, index = (torch.tensor([each[i] for each in part]) for i in (0, 1))
            yield Seen(Drawn(prompt, reward, index=index), images)


def _device() -> torch.device:
    """Where accelerate runs this process."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device
