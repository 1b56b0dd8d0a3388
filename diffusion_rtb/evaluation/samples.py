"""Draw what an evaluation compares: samples of prior and posterior at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.abilities import Judge
from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.estimates import log_weights
from diffusion_rtb.evaluation.choice import PICTURED, spread
from diffusion_rtb.evaluation.features import check_embedder, features_of
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered

__all__ = ["Drawn", "Pictured", "Scorer", "draw"]

Scorer = Callable[[Tensor, Sequence[str], Sequence[Metadata]], Mapping[str, Tensor]]
"""Images, the prompt of each and what is known of it -> values of each by name."""

PICTURES, DOTS = 4, 2000
"""Pictures kept per pictured prompt and side; of vectors, which become dots in one picture, more."""


@dataclass(frozen=True, eq=False)
class Drawn(Rows):
    """Samples of one model, those of one prompt adjacent, reduced to what the evaluation needs."""

    prompt: Int[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    log_q: Float[Tensor, "batch steps"] | None = None
    log_p: Float[Tensor, "batch steps"] | None = None
    embedding: Float[Tensor, "batch features"] | None = None
    labels: Int[Tensor, "batch factors"] | None = None
    """The judge's class of each image, by factor."""
    scores: Mapping[str, Float[Tensor, " batch"]] | None = None
    """What metrics saw in the images, by `METRIC.value`; see `Metric.scores`."""
    norm_q: Float[Tensor, "batch steps"] | None = None
    """|e_q| and, below, |e_p| at the posterior's states, of what the scheduler is given at each step."""
    norm_p: Float[Tensor, "batch steps"] | None = None

    @staticmethod
    def of_batch(batch: Batch) -> Drawn:
        """A batch without its states and images, which at full size would fill the memory."""
        densities = batch.log_q, batch.log_p
        return Drawn(batch.prompt, batch.reward, *densities, norm_q=batch.norm_q, norm_p=batch.norm_p)

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
    """The first few images, or vectors, of each pictured prompt."""

    image: Float[Tensor, "kept *shape"]
    reward: Float[Tensor, " kept"]


def draw(
    sampler: Sampler,
    config: EvalConfig,
    count: int,
    seed: int,
    *,
    posterior: bool,
    embedder: Any = None,
    judge: Any = None,
    advance: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
    scorer: Scorer | None = None,
) -> tuple[Drawn, Pictured]:
    """`count` samples per prompt, in batches; the k-th sample of a prompt has the same noise for prior and posterior.

    Args:
        sampler: Holds the models, the reward and the prompts.
        config: Factors to judge.
        count: Samples per prompt.
        seed: The run's seed.
        posterior: Sample the posterior, with both log-densities; otherwise the prior.
        embedder: Has `embed(images)`, or is a function of images; None: no embeddings.
        judge: Has `classify(images, classes)`; needed when the config names factors.
        advance: Told how many samples a batch had, after each.
        numbers: The sampler's prompts by their rows in the run's table, on which the noise depends; None: they are the table.
        scorer: What metrics want of the images while they are there, see `Metric.scores`; None: nothing.

    Raises:
        ValueError: embedder or judge lacks its method, or a feature is not finite.
    """
    _check_tools(config, embedder, judge)
    total = len(sampler.prompts)
    numbers = range(total) if numbers is None else numbers
    pictured = set(spread(total, PICTURED))
    pairs = numbered(range(total), count)
    seeds = [seed_of(seed, "eval", numbers[row], k) for row, k in pairs]
    parts, pictures = [], []
    batches = sampler.stream([row for row, _ in pairs], seeds, of_prior=not posterior)
    for chunk, batch in zip(sampler.chunks(len(pairs)), batches, strict=True):
        assert batch.images is not None
        found = sampler.completed(batch) if posterior else replace(batch, log_p=None, norm_p=None)
        images, most = batch.images.to(sampler.prior.device), PICTURES if batch.images.ndim == 4 else DOTS
        labels = [judge.classify(images, list(f.classes)).argmax(1).cpu() for f in config.factors]
        names = [f"sample {k} of prompt {sampler.prompts[row]!r}" for row, k in pairs[chunk]]
        embedding = None if embedder is None else features_of(embedder, images, names)
        parts.append(
            replace(Drawn.of_batch(found), embedding=embedding, labels=torch.stack(labels, 1) if labels else None)
        )
        if scorer is not None:
            rows = batch.prompt.tolist()
            scores = scorer(images, sampler.texts(rows), [sampler.metadata[row] for row in rows])
            parts[-1] = replace(parts[-1], scores={name: values.cpu() for name, values in scores.items()})
        first = [i for i, (row, k) in enumerate(pairs[chunk]) if k < most and row in pictured]
        pictures.append(Pictured(batch.images, batch.reward)[torch.tensor(first, dtype=torch.long)])
        if advance is not None:
            advance(len(batch))
    return Drawn.cat(parts), Pictured.cat(pictures)


def _check_tools(config: EvalConfig, embedder: Any, judge: Any) -> None:
    if embedder is not None:
        check_embedder(embedder)
    if config.factors and not isinstance(judge, Judge):
        raise ValueError(
            f"eval.judge {type(judge).__name__} has no method classify(images, classes), which eval.factors need; "
            "`clip_score` and `classifier` have one."
        )
