"""Draw trajectories with their rewards, and fill in the log-densities that are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.rewarding import evaluate_reward
from diffusion_rtb.rollout import rollout, score
from diffusion_rtb.trajectory import Trajectory

__all__ = ["Actor", "Experience", "Stopwatch"]


@dataclass(frozen=True, eq=False)
class Experience:
    """Trajectories with their prompts and rewards; cut and joined as a whole, so that no field can go stale alone."""

    trajectory: Trajectory
    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table."""
    reward: Float[Tensor, " batch"]
    log_q: Float[Tensor, "batch steps"] | None = None
    """Posterior log-density, None while it has to be computed; nats."""
    log_p: Float[Tensor, "batch steps"] | None = None
    """Prior log-density, None while it has to be computed; nats."""

    def __len__(self) -> int:
        return self.trajectory.batch

    def __getitem__(self, index: Sequence[int] | Int[Tensor, " rows"] | slice) -> Experience:
        rows = index if isinstance(index, slice) else torch.as_tensor(index, device=self.prompt.device)
        return Experience(
            trajectory=self.trajectory[rows],
            prompt=self.prompt[rows],
            reward=self.reward[rows],
            log_q=None if self.log_q is None else self.log_q[rows],
            log_p=None if self.log_p is None else self.log_p[rows],
        )

    def to(self, device: torch.device | str) -> Experience:
        return Experience(
            trajectory=self.trajectory.to(device),
            prompt=self.prompt.to(device),
            reward=self.reward.to(device),
            log_q=None if self.log_q is None else self.log_q.to(device),
            log_p=None if self.log_p is None else self.log_p.to(device),
        )

    @staticmethod
    def cat(parts: Sequence[Experience]) -> Experience:
        """Join batches; a log-density is known afterwards only if it was known in every part."""
        log_q = [part.log_q for part in parts if part.log_q is not None]
        log_p = [part.log_p for part in parts if part.log_p is not None]
        return Experience(
            trajectory=Trajectory.cat([part.trajectory for part in parts]),
            prompt=torch.cat([part.prompt for part in parts]),
            reward=torch.cat([part.reward for part in parts]),
            log_q=torch.cat(log_q) if len(log_q) == len(parts) else None,
            log_p=torch.cat(log_p) if len(log_p) == len(parts) else None,
        )


class Stopwatch:
    """Seconds spent per phase since the last `read`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + perf_counter() - start

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class Actor:
    """The prior, the posterior that shares its network, and the reward, on one table of prompts.

    Args:
        prior: The pipeline family, with its adapters attached.
        reward: Scores the decoded images.
        prompts: The run's prompt table; a *row* is an index into it.
        micro_batch: Trajectories per pipeline call, in rollouts and replays alike: networks round differently at other
            batch shapes, and recorded and replayed densities have to agree.
    """

    def __init__(self, prior: Prior, reward: Reward, prompts: Sequence[str], micro_batch: int) -> None:
        self.prior = prior
        self.reward = reward
        self.prompts = list(prompts)
        self.micro_batch = micro_batch
        self.stopwatch = Stopwatch()

    def texts(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> list[str]:
        """The prompts of these rows."""
        return [self.prompts[int(row)] for row in rows]

    def chunks(self, size: int) -> list[slice]:
        """The micro-batches of a batch of `size` trajectories."""
        return [slice(start, min(start + self.micro_batch, size)) for start in range(0, size, self.micro_batch)]

    def from_posterior(
        self, rows: Sequence[int], seeds: Sequence[int], noise_scale: Callable[[float], float] | None = None
    ) -> Experience:
        """Trajectories of the posterior as it is now, with log_q; one per row and seed."""
        with self.stopwatch("rollout"):
            trajectory = self._rollout(rows, seeds, noise_scale)
        experience = self._rewarded(trajectory, rows)
        return replace(experience, log_q=trajectory.log_prob)

    def from_prior(self, rows: Sequence[int], seeds: Sequence[int]) -> Experience:
        """Trajectories of the prior, with log_p; one per row and seed."""
        with self.stopwatch("rollout"), self.prior.as_prior():
            trajectory = self._rollout(rows, seeds, None)
        experience = self._rewarded(trajectory, rows)
        return replace(experience, log_p=trajectory.log_prob)

    def completed(self, experience: Experience) -> Experience:
        """The same trajectories with both log-densities."""
        with self.stopwatch("score"):
            log_q = self._score(experience) if experience.log_q is None else experience.log_q
            log_p = experience.log_p
            if log_p is None:
                with self.prior.as_prior():
                    log_p = self._score(experience)
        return replace(experience, log_q=log_q, log_p=log_p)

    def _rollout(
        self, rows: Sequence[int], seeds: Sequence[int], noise_scale: Callable[[float], float] | None
    ) -> Trajectory:
        parts = [
            rollout(self.prior, self.texts(rows[chunk]), seeds[chunk], noise_scale=noise_scale)
            for chunk in self.chunks(len(rows))
        ]
        return Trajectory.cat(parts)

    def _score(self, experience: Experience) -> Float[Tensor, "batch steps"]:
        parts = [
            score(self.prior, self.texts(experience.prompt[chunk]), experience.trajectory[chunk])
            for chunk in self.chunks(len(experience))
        ]
        return torch.cat(parts)

    def _rewarded(self, trajectory: Trajectory, rows: Sequence[int]) -> Experience:
        with self.stopwatch("reward"):
            images = torch.cat([self.prior.decode(trajectory.x_0[chunk]) for chunk in self.chunks(trajectory.batch)])
            reward = evaluate_reward(
                self.reward, images, self.texts(rows), getattr(self.reward, "__name__", type(self.reward).__name__)
            )
        prompt = torch.tensor(rows, device=trajectory.x.device)
        return Experience(trajectory=trajectory, prompt=prompt, reward=reward.to(prompt.device))
