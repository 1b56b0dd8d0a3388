"""Draw trajectories with their rewards, and fill in the log-densities that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.normal import gaussian_kl
from diffusion_rtb.chain.rollout import rollout, score_with_means, score_with_norms
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.scoring.call import evaluate_reward

__all__ = ["DecodingError", "Sampler", "Stopwatch", "decoded", "numbered", "occurrences"]


PHASES = {
    "rollout": "drawing trajectories",
    "score": "scoring trajectories",
    "reward": "computing rewards",
    "objective": "computing the loss",
    "backward": "taking the gradient",
}
"""What errors call the phases of an iteration."""


class Stopwatch:
    """Seconds spent per phase since the last `read`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            with doing(PHASES.get(phase, phase)):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside the block is not counted."""
        before = dict(self._seconds)
        try:
            yield
        finally:
            self._seconds = before

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class Sampler:
    """The prior, the posterior that shares its network, and the reward, on one table of prompts.

    Everything it answers is on the host. A micro-batch goes to the prior's device to be drawn, decoded or scored, and comes back: a
    batch takes the device's memory of one, however large it is.

    Args:
        prior: The pipeline family, with its adapters attached.
        reward: Scores the decoded images.
        prompts: The run's prompt table; a *row* is an index into it.
        micro_batch: Trajectories per pipeline call, in rollouts and replays alike: networks round differently at other
            batch shapes, and recorded and replayed densities have to agree.
        metadata: What is known of each prompt, for rewards that take it; None: nothing.
        needs_noise: Refuse a scheduler whose steps have none: log-densities are what the samples are for.
    """

    def __init__(
        self,
        prior: Prior,
        reward: Reward,
        prompts: Sequence[str],
        micro_batch: int,
        metadata: Sequence[Metadata] | None = None,
        *,
        needs_noise: bool = False,
    ) -> None:
        self.prior = prior
        self.needs_noise = needs_noise
        self.reward = reward
        self.prompts = list(prompts)
        self.metadata: list[Metadata] = [{} for _ in self.prompts] if metadata is None else list(metadata)
        self.micro_batch = micro_batch
        self.stopwatch = Stopwatch()
        self._features: tuple[list[int], Tensor] | None = None

    def features(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows features"]:
        """`Prior.features` of the prompts of these rows; a text encoder is asked once about each of an iteration's prompts."""
        distinct, place = rows.unique(return_inverse=True)
        asked = distinct.tolist()
        if self._features is None or self._features[0] != asked:
            parts = [self.prior.features(self.texts(asked[chunk])) for chunk in self.chunks(len(asked))]
            self._features = asked, torch.cat(parts)
        held = self._features[1]
        return held[place.to(held.device)]

    def texts(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> list[str]:
        """The prompts of these rows."""
        return [self.prompts[row] for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]

    def chunks(self, size: int) -> list[slice]:
        """The micro-batches of a batch of `size` trajectories."""
        return [slice(start, min(start + self.micro_batch, size)) for start in range(0, size, self.micro_batch)]

    def draw(
        self,
        rows: Sequence[int],
        seeds: Sequence[int],
        *,
        of_prior: bool = False,
        noise_scale: Callable[[float], float] | None = None,
        images: bool = False,
    ) -> Batch:
        """Trajectories with their rewards, one per row and seed, of the posterior as it is now or of the prior.

        Where the sampler's steps have no noise there are no log-densities, neither now nor later.

        Args:
            rows: Prompts.
            seeds: Of the noise; the same trajectories need the same micro-batches, too.
            of_prior: Draw from the prior, and know log_p; otherwise from the posterior, and know log_q.
            noise_scale: Exploration, see `TrajectoryRecorder`.
            images: Keep what the reward saw; `stream` keeps no more than a micro-batch.
        """
        parts = []
        with self.stopwatch("rollout"), self.prior.as_prior() if of_prior else nullcontext():
            for chunk in self.chunks(len(rows)):
                parts.append(self._drawn(rows[chunk], seeds[chunk], noise_scale).to("cpu"))
        batch = self.rewarded(self.joined(parts), rows, images=images)
        if not batch.trajectory.has_density:
            return batch
        known, norm = batch.trajectory.log_prob, batch.trajectory.output_norm
        return replace(batch, log_p=known, norm_p=norm) if of_prior else replace(batch, log_q=known, norm_q=norm)

    def stream(self, rows: Sequence[int], seeds: Sequence[int], *, of_prior: bool = False) -> Iterator[Batch]:
        """`draw` one micro-batch after the other, each with its images, so that no number of rows fills the memory."""
        for chunk in self.chunks(len(rows)):
            yield self.draw(rows[chunk], seeds[chunk], of_prior=of_prior, images=True)

    def samples_of_prior(self, rows: Sequence[int], seeds: Sequence[int]) -> Float[Tensor, "batch *dims"]:
        """x_0 of the prior, one per row and seed of one micro-batch."""
        with self.stopwatch("rollout"), self.prior.as_prior():
            return self._drawn(rows, seeds).x_0.cpu()

    def _drawn(
        self, rows: Sequence[int], seeds: Sequence[int], noise_scale: Callable[[float], float] | None = None
    ) -> Trajectory:
        texts = self.texts(rows)
        return rollout(self.prior, texts, seeds, noise_scale=noise_scale, needs_noise=self.needs_noise)

    def joined(self, parts: Sequence[Trajectory]) -> Trajectory:
        """Micro-batches, on the host, as one batch; page-locked for CUDA, which then fetches them without a wait of the host."""
        whole = Trajectory.cat(parts)
        return replace(whole, x=whole.x.pin_memory()) if self.prior.device.type == "cuda" else whole

    def completed(self, batch: Batch, *, means: bool = False) -> Batch:
        """The same trajectories with both log-densities, and the norms that the network calls for these gave besides.

        Those that have no density are as they were. With `means` those of the prior's transitions are kept, which the same calls
        give, where they had to be made.
        """
        if not batch.trajectory.has_density:
            return batch
        with self.stopwatch("score"):
            if batch.log_q is None:
                log_q, norm_q = self._scored(score_with_norms, batch)
                batch = replace(batch, log_q=log_q, norm_q=norm_q)
            if batch.log_p is None:
                with self.prior.as_prior():
                    score = score_with_means if means else score_with_norms
                    log_p, norm_p, *mean_p = self._scored(score, batch)
                batch = replace(batch, log_p=log_p, norm_p=norm_p, mean_p=mean_p[0] if means else batch.mean_p)
        return batch

    def with_kl(self, batch: Batch) -> Batch:
        """The same trajectories with both log-densities, the prior's means and the closed-form KL of each transition."""
        trajectory = batch.trajectory
        with self.stopwatch("score"):
            log_q, _, mean_q = self._scored(score_with_means, batch)
            log_p, mean_p = batch.log_p, batch.mean_p
            if log_p is None or mean_p is None:
                with self.prior.as_prior():
                    log_p, _, mean_p = self._scored(score_with_means, batch)
        kl = torch.zeros_like(log_q)
        for i in trajectory.stochastic.nonzero().flatten().tolist():
            kl[:, i] = gaussian_kl(mean_q[:, i], mean_p[:, i], float(trajectory.std[i]), kl.dtype)
        log_q = log_q if batch.log_q is None else batch.log_q
        return replace(batch, log_q=log_q, log_p=log_p, mean_p=mean_p, kl=kl)

    def _scored(
        self, score: Callable[[Prior, Sequence[str], Trajectory], tuple[Tensor, ...]], batch: Batch
    ) -> tuple[Float[Tensor, "batch steps *rest"], ...]:
        """Log-densities, and what else this way of scoring knows of each step."""
        parts = [[part.cpu() for part in score(*micro)] for micro in self._micro_batches(batch)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Prior, list[str], Trajectory]]:
        """What `score` takes of each micro-batch, on the device."""
        for chunk in self.chunks(len(batch)):
            yield self.prior, self.texts(batch.prompt[chunk]), batch.trajectory[chunk].to(self.prior.device)

    def rewarded(self, trajectory: Trajectory, rows: Sequence[int], *, images: bool = False) -> Batch:
        """Trajectories, one per row, with their prompts and rewards, and with their images where these are asked for."""
        kept: list[Tensor] = []
        reward = self.rewards(
            trajectory.x_0, rows, (lambda seen: kept.append(seen.cpu())) if images else lambda _: None
        )
        return Batch(trajectory, torch.tensor(rows), reward, images=torch.cat(kept) if images else None)

    def rewards(
        self, x_0: Float[Tensor, "batch *dims"], rows: Sequence[int], seen: Callable[[Tensor], object] = lambda _: None
    ) -> Float[Tensor, " batch"]:
        """r of each sample, decoded and scored one micro-batch after the other, with `seen` told the images of each."""
        name = getattr(self.reward, "__name__", type(self.reward).__name__)
        parts = []
        with self.stopwatch("reward"):
            for chunk in self.chunks(len(x_0)):
                images = decoded(self.prior, x_0[chunk].to(self.prior.device))
                known = [self.metadata[int(row)] for row in rows[chunk]]
                parts.append(evaluate_reward(self.reward, images, self.texts(rows[chunk]), name, metadata=known).cpu())
                seen(images)
        return torch.cat(parts)


class DecodingError(NotFiniteError):
    """Samples or pictures that are not numbers; the message says which part of the prior made them."""


def decoded(prior: Prior, x_0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *shape"]:
    """`prior.decode(x_0)`, all of it finite: a reward would else be blamed for what the prior's decoder did.

    Raises:
        DecodingError: x_0 itself, or what became of it, is not finite.
    """
    bad = _first_bad(x_0)
    if bad is not None:
        raise DecodingError(
            f"x_0 of sample {bad} is not finite: the prior's network or its sampler made NaN or infinity. "
            "Use dtype: float32, a smaller train.lr, or other weights."
        )
    with doing("decoding samples"):
        images = prior.decode(x_0)
    bad = _first_bad(images)
    if bad is not None:
        raise DecodingError(
            f"Sample {bad} is finite, x_0 from {float(x_0[bad].min()):.3g} to {float(x_0[bad].max()):.3g}, and its picture is not: "
            f"{type(prior).__name__}'s decoder (the VAE of a latent model) made NaN or infinity, before the reward saw it. Use "
            "dtype: float32, or a VAE whose weights are sound in this precision."
        )
    return images


def _first_bad(values: Tensor) -> int | None:
    """Which row has a number that is not finite."""
    if bool(torch.isfinite(values).all()):
        return None
    return int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])


def numbered(rows: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(row, number) of `count` samples of each row, adjacent; a row that comes again goes on with its numbers.

    A sample's noise depends on both, so that it is the same whatever it is drawn with.
    """
    return [(row, n * count + k) for row, n in zip(rows, occurrences(rows), strict=True) for k in range(count)]


def occurrences(rows: Sequence[int]) -> list[int]:
    """How often each row came before in the same list: a prompt that comes twice in an iteration is to be drawn differently."""
    came: Counter[int] = Counter()
    before = []
    for row in rows:
        before.append(came[row])
        came[row] += 1
    return before
