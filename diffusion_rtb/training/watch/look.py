"""One look at a model: samples at fixed prompts and seeds, as the reward, the judges and the embedder see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.watch.section import WatchConfig
from diffusion_rtb.estimates import elbo, log_weight, within_prompts
from diffusion_rtb.evaluation.choice import spread
from diffusion_rtb.evaluation.features import features_of
from diffusion_rtb.evaluation.similarity import mean_pairwise_cosine_distance, vendi_score
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler, numbered
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.training.watch.change import mean
from diffusion_rtb.training.watch.tools import Tools

__all__ = ["Look", "numbers", "plan", "take"]

PROMPTS = 4
"""Of a look, where the config does not say how many."""


@dataclass(frozen=True, eq=False)
class Look(Rows):
    """Samples, those of one prompt adjacent; sample i of the prior and sample i of the posterior began at the same noise."""

    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table."""
    reward: Float[Tensor, " batch"]
    judges: Mapping[str, Float[Tensor, " batch"]]
    """Scores by the judge's name."""
    x_0: Float[Tensor, "batch *dims"]
    log_q: Float[Tensor, "batch steps"]
    """Of the network that drew; nats."""
    log_p: Float[Tensor, "batch steps"]
    loudness: Float[Tensor, " batch"]
    """|e_q| / |e_p|, mean over the steps with a density; 1 of the prior."""
    embedding: Float[Tensor, "batch features"] | None = None

    def with_reward(self, reward: Float[Tensor, " batch"]) -> Look:
        """The same samples as the reward sees them today."""
        return replace(self, reward=reward)


def plan(config: RunConfig, watch: WatchConfig) -> tuple[list[int], list[int]]:
    """Prompt row and seed of each sample of a look: always the same."""
    texts = config.prompts.texts()
    rows = spread(len(texts), watch.prompts or min(PROMPTS, len(texts)))
    pairs = numbered(rows, watch.samples)
    return [row for row, _ in pairs], [seed_of(config.seed, "watch", *pair) for pair in pairs]


def take(
    sampler: Sampler,
    tools: Tools,
    rows: Sequence[int],
    seeds: Sequence[int],
    *,
    of_prior: bool,
    between: Callable[[], object] = lambda: None,
) -> Look:
    """Draw and score, one micro-batch after the other.

    Args:
        sampler: Holds the models, the reward and the prompts.
        tools: Judges and embedder.
        rows: Prompt of each sample.
        seeds: Noise of each sample.
        of_prior: Of the prior; else of the posterior as it is.
        between: Called before each micro-batch; may raise.

    Raises:
        RewardError: the reward or a judge failed, or gave something else than one finite number for each image.
    """
    parts = []
    for chunk in sampler.chunks(len(rows)):
        between()
        batch = sampler.draw(rows[chunk], seeds[chunk], of_prior=of_prior, images=True)
        parts.append(_seen(sampler, tools, _both(sampler, batch, of_prior)))
    return Look.cat(parts)


def _both(sampler: Sampler, batch: Batch, of_prior: bool) -> Batch:
    """With both densities; of the prior they are the same."""
    return replace(batch, log_q=batch.log_p, norm_q=batch.norm_p) if of_prior else sampler.completed(batch)


def _seen(sampler: Sampler, tools: Tools, batch: Batch) -> Look:
    assert batch.images is not None
    assert batch.log_q is not None
    assert batch.log_p is not None
    assert batch.norm_q is not None
    assert batch.norm_p is not None
    images, texts = batch.images.to(sampler.prior.device), sampler.texts(batch.prompt)
    known = [sampler.metadata[row] for row in batch.prompt.tolist()]
    judges = {
        name: evaluate_reward(judge, images, texts, f"{name} of watch.judges", metadata=known).cpu()
        for name, judge in tools.judges.items()
    }
    names = [f"a sample of {text!r}" for text in texts]
    embedding = None if tools.embedder is None else features_of(tools.embedder, images, names, "watch.embedder")
    loudness = (batch.norm_q.double() / batch.norm_p.double()).nanmean(1)  # 0 / 0 where a step has no density
    x_0 = batch.trajectory.x_0.clone()  # a view would keep the whole trajectories
    return Look(batch.prompt, batch.reward, judges, x_0, batch.log_q, batch.log_p, loudness, embedding)


def numbers(look: Look, beta: float) -> dict[str, float]:
    """What goes into metrics.jsonl, as `watch/NAME`; prompts have the same say.

    Args:
        look: Of the posterior, or of the prior, whose KL is 0.
        beta: Of the iteration; nats per unit of reward.
    """
    log_w = log_weight(look.log_q.double(), look.log_p.double(), look.reward.double(), beta)
    log_ratio = (look.log_q.double() - look.log_p.double()).sum(1)
    found = {
        "reward": mean(look.reward, look.prompt),
        "kl": mean(log_ratio, look.prompt),
        "elbo": elbo(log_w, look.prompt),
        "norm_ratio": mean(look.loudness, look.prompt),
        "samples": float(look.prompt.unique(return_counts=True)[1].min()),
    }
    if look.embedding is not None:
        found["vendi"] = within_prompts(vendi_score, look.embedding, look.prompt)
        found["distance"] = within_prompts(mean_pairwise_cosine_distance, look.embedding, look.prompt)
    return found | {f"judge/{name}": mean(scores, look.prompt) for name, scores in look.judges.items()}
