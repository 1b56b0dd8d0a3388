"""Samples of one model, reduced to what an evaluation compares: drawn or read in batches, scored, and let go of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffusion_rtb.abilities import Labeller
from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.estimates import log_weights
from diffusion_rtb.evaluation.choice import PICTURED, spread
from diffusion_rtb.evaluation.features import check_embedder, features_of
from diffusion_rtb.interfaces import Reward
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered
from diffusion_rtb.scoring.call import evaluate_reward

__all__ = ["Drawn", "Pictured", "Sampled", "Scorer", "Seen", "Side", "Tools", "draw", "measure"]

Scorer = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Mapping[str, Tensor]]
"""Images, the prompt of each and what is known of it -> values of each by name."""

PICTURES, DOTS = 4, 2000
"""Pictures kept per pictured prompt and side; of vectors, which become dots in one picture, more."""

EXTREMES = 8
"""Samples with the largest and with the smallest reward whose pictures are kept, each."""


@dataclass(frozen=True, eq=False)
class Drawn(Rows):
    """Samples of one model, those of one prompt adjacent, reduced to what the evaluation needs."""

    shared: ClassVar[frozenset[str]] = frozenset({"exact_profile"})

    prompt: Int[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    log_q: Float[Tensor, "batch steps"] | None = None
    log_p: Float[Tensor, "batch steps"] | None = None
    embedding: Float[Tensor, "batch features"] | None = None
    labels: Int[Tensor, "batch factors"] | None = None
    """The labeller's class of each image, by factor."""
    scores: Mapping[str, Float[Tensor, " batch"]] | None = None
    """What metrics saw in the images, by `METRIC.value`; see `Metric.scores`."""
    norm_q: Float[Tensor, "batch steps"] | None = None
    """|e_q| and, below, |e_p| at the posterior's states, of what the scheduler is given at each step."""
    norm_p: Float[Tensor, "batch steps"] | None = None
    judges: Mapping[str, Float[Tensor, " batch"]] | None = None
    """What the held-out judges say, by name."""
    index: Int[Tensor, " batch"] | None = None
    """k of the sample among those of its prompt: equal k is equal noise on both sides."""
    exact_profile: Float[Tensor, " steps"] | None = None
    """KL of each step of the exact posterior through the same chain, where the prior knows it; nats."""

    @staticmethod
    def of_batch(batch: Batch) -> Drawn:
        """A batch without its states and images, which at full size would fill the memory."""
        densities = batch.log_q, batch.log_p
        return Drawn(batch.prompt, batch.reward, *densities, norm_q=batch.norm_q, norm_p=batch.norm_p)

    @staticmethod
    def none() -> Drawn:
        """A side that is not there."""
        return Drawn(torch.zeros(0, dtype=torch.long), torch.zeros(0))

    @property
    def densities(self) -> tuple[Float[Tensor, "batch steps"], Float[Tensor, "batch steps"]]:
        """log_q and log_p of the posterior's trajectories."""
        assert self.log_q is not None
        assert self.log_p is not None
        return self.log_q, self.log_p

    def log_weights(self, beta: float) -> Float[Tensor, " batch"]:
        """log w of the posterior's trajectories; nats."""
        return log_weights(self.reward, *self.densities, beta)

    def of(self, row: int) -> Drawn:
        """The samples of one prompt row."""
        return self[(self.prompt == row).nonzero().flatten()]

    def first(self, count: int) -> Drawn:
        """The first `count` samples of each prompt."""
        rows = [(self.prompt == row).nonzero().flatten()[:count] for row in self.prompt.unique().tolist()]
        return self[torch.cat(rows)]


@dataclass(frozen=True, eq=False)
class Pictured(Rows):
    """Samples that are shown: of a picture its levels, 0 to 255, of a vector its numbers."""

    image: Shaped[Tensor, "kept *shape"]
    reward: Float[Tensor, " kept"]
    prompt: Int[Tensor, " kept"]
    index: Int[Tensor, " kept"]

    @property
    def shown(self) -> Float[Tensor, "kept *shape"]:
        """Pictures in [0, 1], or vectors."""
        return self.image / 255 if self.image.dtype == torch.uint8 else self.image

    def pairs(self, prompts: int) -> Pictured:
        """The first few of each pictured prompt, for those that have a partner on the other side."""
        rows = spread(prompts, PICTURED)
        most = PICTURES if self.image.dtype == torch.uint8 else DOTS
        return self[(torch.isin(self.prompt, torch.tensor(rows)) & (self.index < most)).nonzero().flatten()]

    def extremes(self, *, best: bool) -> Pictured:
        """The few with the largest reward, or the smallest, the most extreme first."""
        return self[self.reward.sort(descending=best, stable=True).indices[:EXTREMES]]


@dataclass(frozen=True, eq=False)
class Seen(Rows):
    """One batch as its side hands it over: with index, and without what tools say."""

    drawn: Drawn
    image: Float[Tensor, "batch *shape"]


class Side(ABC):
    """Where the samples of one side come from: the same ones in the same order whenever they are asked for."""

    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    device: torch.device = torch.device("cpu")
    """Where its images are handed over."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of all prompts together."""

    def known(self, drawn: Drawn) -> Sequence[Metadata]:
        """What is known of the prompt of each sample."""
        return [self.metadata[row] for row in drawn.prompt.tolist()]

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Seen]:
        """From the sample `start` on; images are where the tools are to look at them."""


class Sampled(Side):
    """`count` samples per prompt of a prior or its posterior; the k-th of a prompt has the same noise for both.

    Args:
        sampler: Holds the models, the reward and the prompts.
        count: Samples per prompt.
        seed: The run's.
        posterior: Sample the posterior, with both log-densities; otherwise the prior.
        numbers: The sampler's prompts by their rows in the run's table, on which the noise depends; None: they are the table.
    """

    def __init__(
        self, sampler: Sampler, count: int, seed: int, *, posterior: bool, numbers: Sequence[int] | None = None
    ) -> None:
        self.sampler, self.posterior, self.device = sampler, posterior, sampler.prior.device
        self.prompts, self.metadata = sampler.prompts, sampler.metadata
        names = range(len(sampler.prompts)) if numbers is None else numbers
        self.pairs = numbered(range(len(sampler.prompts)), count)
        self.seeds = [seed_of(seed, "eval", names[row], k) for row, k in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, start: int = 0) -> Iterator[Seen]:
        """See `Side`."""
        pairs, seeds = self.pairs[start:], self.seeds[start:]
        batches = self.sampler.stream([row for row, _ in pairs], seeds, of_prior=not self.posterior)
        for chunk, batch in zip(self.sampler.chunks(len(pairs)), batches, strict=True):
            assert batch.images is not None
            found = self.sampler.completed(batch) if self.posterior else replace(batch, log_p=None, norm_p=None)
            index = torch.tensor([k for _, k in pairs[chunk]])
            image = batch.images.to(self.device)
            yield Seen(replace(Drawn.of_batch(found), index=index), image)


@dataclass(frozen=True)
class Tools:
    """What looks at every image besides the reward.

    Raises:
        ValueError: one lacks its method.
    """

    embedder: Any = None
    """Has `embed(images)`, or is a function of images; None: no embeddings."""
    labeller: Any = None
    """Has `classify(images, classes)`; needed when the config names factors."""
    judges: Mapping[str, Reward] = field(default_factory=dict)
    """Held-out rewards by name."""
    scorer: Scorer | None = None
    """What metrics want of the images while they are there, see `Metric.scores`."""

    def check(self, config: EvalConfig) -> None:
        """Refuse tools that lack what the config needs of them."""
        if self.embedder is not None:
            check_embedder(self.embedder)
        if config.factors and not isinstance(self.labeller, Labeller):
            raise ValueError(
                f"eval.labeller {type(self.labeller).__name__} has no method classify(images, classes), which eval.factors need; "
                "`clip_score` and `classifier` have one."
            )

    def look(self, seen: Seen, side: Side, config: EvalConfig) -> Drawn:
        """The batch without its images, with all that the tools say of them."""
        rows, image = seen.drawn.prompt.tolist(), seen.image
        texts, known = [side.prompts[row] for row in rows], side.known(seen.drawn)
        labels = [self.labeller.classify(image, list(f.classes)).argmax(1).cpu() for f in config.factors]
        scores = None if self.scorer is None else self.scorer(image, texts, known)
        judges = {
            name: evaluate_reward(judge, image, texts, f"{name} (a judge)", metadata=known).cpu()
            for name, judge in self.judges.items()
        }
        assert seen.drawn.index is not None
        names = [f"sample {k} of prompt {text!r}" for k, text in zip(seen.drawn.index.tolist(), texts, strict=True)]
        return replace(
            seen.drawn,
            embedding=None if self.embedder is None else features_of(self.embedder, image, names),
            labels=torch.stack(labels, 1) if labels else None,
            scores=None if scores is None else {name: values.cpu() for name, values in scores.items()},
            judges=judges or None,
        )


@runtime_checkable
class Keeper(Protocol):
    """Remembers what was measured of a side."""

    def read(self) -> list[tuple[Drawn, Pictured]]:
        """Batches from the first sample on."""

    def write(self, start: int, part: tuple[Drawn, Pictured]) -> None:
        """A batch whose first sample is number `start`."""


def measure(
    side: Side,
    config: EvalConfig,
    tools: Tools,
    advance: Callable[[int], None] | None = None,
    *,
    extremes: bool = False,
    keeper: Keeper | None = None,
) -> tuple[Drawn, Pictured]:
    """All samples of a side, and the pictures of a few.

    Args:
        side: What is measured.
        config: Factors to label.
        tools: What looks at the images.
        advance: Told how many samples a batch had, after each.
        extremes: Keep the pictures with the largest and the smallest rewards, too.
        keeper: Has what was measured before an interruption, and is handed each further batch.
    """
    tools.check(config)
    advance = advance or (lambda _: None)
    parts = [] if keeper is None else keeper.read()
    done = sum(len(drawn) for drawn, _ in parts)
    if done:
        advance(done)
    for seen in side.batches(done):
        parts.append(
            (
                tools.look(seen, side, config),
                _pictured(seen, [pictured for _, pictured in parts], len(side.prompts), extremes),
            )
        )
        if keeper is not None:
            keeper.write(done, parts[-1])
        done += len(seen)
        advance(len(seen))
    return Drawn.cat([drawn for drawn, _ in parts]), Pictured.cat([pictured for _, pictured in parts])


def _pictured(seen: Seen, before: Sequence[Pictured], prompts: int, extremes: bool) -> Pictured:
    """Those of a batch that are pictured, or that are extreme among all so far: few, however many batches there are."""
    image = seen.image.cpu()
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8) if image.ndim == 4 else image
    assert seen.drawn.index is not None
    found = Pictured(levels, seen.drawn.reward, seen.drawn.prompt, seen.drawn.index)
    kept = torch.zeros(len(found), dtype=torch.bool)
    pairs = found.pairs(prompts)
    wanted = set(zip(pairs.prompt.tolist(), pairs.index.tolist(), strict=True))
    if extremes:
        rewards = torch.cat([*(part.reward for part in before), found.reward])
        for best in (True, False):
            order = rewards.sort(descending=best, stable=True).indices[:EXTREMES] - (len(rewards) - len(found))
            kept[order[order >= 0]] = True
    kept |= torch.tensor([pair in wanted for pair in zip(found.prompt.tolist(), found.index.tolist(), strict=True)])
    return found[kept.nonzero().flatten()]


def draw(
    sampler: Sampler,
    config: EvalConfig,
    count: int,
    seed: int,
    *,
    posterior: bool,
    embedder: Any = None,
    labeller: Any = None,
    judges: Mapping[str, Reward] | None = None,
    advance: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
    scorer: Scorer | None = None,
) -> tuple[Drawn, Pictured]:
    """`count` samples per prompt of the posterior or the prior, measured; see `Sampled`, `Tools` and `measure`."""
    side = Sampled(sampler, count, seed, posterior=posterior, numbers=numbers)
    return measure(side, config, Tools(embedder, labeller, judges or {}, scorer), advance, extremes=posterior)
