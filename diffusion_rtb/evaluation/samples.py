"""Draw what an evaluation compares: samples of prior and posterior at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.choice import PICTURED, spread
from diffusion_rtb.sampling.decoding import decoded
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Drawn", "draw"]

PICTURES, DOTS = 4, 2000
"""Pictures kept per pictured prompt and side; of vectors, which become dots in one picture, more."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of one model, those of one prompt adjacent, reduced to what the evaluation needs."""

    prompt: Int[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    embedding: Float[Tensor, "batch features"] | None
    labels: dict[str, Tensor]
    """The judge's class of each image, by factor; (batch,)."""
    pictures: Float[Tensor, "kept *shape"]
    """The first few images, or vectors, of each pictured prompt."""
    picture_rewards: Float[Tensor, " kept"]
    log_q: Float[Tensor, "batch steps"] | None = None
    log_p: Float[Tensor, "batch steps"] | None = None

    def of(self, row: int | None) -> Drawn:
        """The samples of one prompt row, without pictures; all of them for None."""
        if row is None:
            return self
        here = self.prompt == row
        return Drawn(
            prompt=self.prompt[here],
            reward=self.reward[here],
            embedding=None if self.embedding is None else self.embedding[here],
            labels={name: labels[here] for name, labels in self.labels.items()},
            pictures=self.pictures[:0],
            picture_rewards=self.picture_rewards[:0],
            log_q=None if self.log_q is None else self.log_q[here],
            log_p=None if self.log_p is None else self.log_p[here],
        )

    @staticmethod
    def cat(parts: Sequence[Drawn]) -> Drawn:
        """Join batches in order; a field is None when it is None in every part."""

        def joined(values: Sequence[Tensor | None]) -> Tensor | None:
            found = [value for value in values if value is not None]
            return torch.cat(found) if found else None

        return Drawn(
            prompt=torch.cat([part.prompt for part in parts]),
            reward=torch.cat([part.reward for part in parts]),
            embedding=joined([part.embedding for part in parts]),
            labels={name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels},
            pictures=torch.cat([part.pictures for part in parts]),
            picture_rewards=torch.cat([part.picture_rewards for part in parts]),
            log_q=joined([part.log_q for part in parts]),
            log_p=joined([part.log_p for part in parts]),
        )

    def first(self, count: int) -> Drawn:
        """The first `count` samples of each prompt."""
        rows = [(self.prompt == row).nonzero().flatten()[:count] for row in self.prompt.unique().tolist()]
        index = torch.cat(rows)
        embedding = None if self.embedding is None else self.embedding[index]
        labels = {name: found[index] for name, found in self.labels.items()}
        return Drawn(self.prompt[index], self.reward[index], embedding, labels, self.pictures, self.picture_rewards)


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
) -> Drawn:
    """`count` samples per prompt, in batches; the k-th sample of a prompt has the same noise for prior and posterior.

    Args:
        sampler: Holds the models, the reward and the prompts.
        config: Factors to judge.
        count: Samples per prompt.
        seed: The run's seed.
        posterior: Sample the posterior, with both log-densities; otherwise the prior.
        embedder: Has `embed(images)`; None: no embeddings.
        judge: Has `classify(images, classes)`; needed when the config names factors.
        advance: Told how many samples a batch had, after each.
        numbers: The sampler's prompts by their rows in the run's table, on which the noise depends; None: they are the table.

    Raises:
        ValueError: embedder or judge lacks its method.
    """
    _check_tools(config, embedder, judge)
    total = len(sampler.prompts)
    numbers = range(total) if numbers is None else numbers
    pictured = set(spread(total, PICTURED))
    pairs = [(row, k) for row in range(total) for k in range(count)]
    parts: list[Drawn] = []
    for chunk in sampler.chunks(len(pairs)):
        rows = [row for row, _ in pairs[chunk]]
        seeds = [seed_of(seed, "eval", numbers[row], k) for row, k in pairs[chunk]]
        found = sampler.completed(sampler.from_posterior(rows, seeds)) if posterior else sampler.from_prior(rows, seeds)
        images = decoded(sampler.prior, found.trajectory.x_0)
        labels = {f.name: judge.classify(images, list(f.classes)).argmax(1).cpu() for f in config.factors}
        embedding = None if embedder is None else embedder.embed(images).cpu()
        most = PICTURES if images.ndim == 4 else DOTS
        first = torch.tensor([k < most and row in pictured for row, k in pairs[chunk]])
        # The trajectories themselves are not kept: at full size they would fill the memory.
        found = found.to("cpu")
        kept = (images.cpu()[first], found.reward[first])
        densities = (found.log_q, found.log_p) if posterior else (None, None)
        parts.append(Drawn(found.prompt, found.reward, embedding, labels, *kept, *densities))
        if advance is not None:
            advance(len(rows))
    return Drawn.cat(parts)


def _check_tools(config: EvalConfig, embedder: Any, judge: Any) -> None:
    if embedder is not None and not callable(getattr(embedder, "embed", None)):
        raise ValueError(
            f"eval.embedder {type(embedder).__name__} has no method embed(images); take `clip_score`, or null for no diversity."
        )
    if config.factors and not callable(getattr(judge, "classify", None)):
        raise ValueError(
            f"eval.judge {type(judge).__name__} has no method classify(images, classes), which eval.factors need; "
            "`clip_score` and `classifier` have one."
        )
