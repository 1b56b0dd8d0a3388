"""A batch of trajectories with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.trajectory import Trajectory

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Trajectories with their prompts and rewards; cut and joined as a whole, so that no field can go stale alone."""

    trajectory: Trajectory
    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table."""
    reward: Float[Tensor, " batch"]
    log_q: Float[Tensor, "batch steps"] | None = None
    """Posterior log-density, None while it has to be computed; nats."""
    log_p: Float[Tensor, "batch steps"] | None = None
    """Prior log-density, None while it has to be computed; nats."""
    mean_p: Float[Tensor, "batch steps *dims"] | None = None
    """Means of the prior's transitions, where an objective uses the closed-form KL."""
    kl: Float[Tensor, "batch steps"] | None = None
    """KL(q || p) of the transitions at these states in closed form, where an objective uses it; nats."""

    def __len__(self) -> int:
        return self.trajectory.batch

    def __getitem__(self, index: Sequence[int] | Int[Tensor, " rows"] | slice) -> Batch:
        rows = index if isinstance(index, slice) else torch.as_tensor(index, device=self.prompt.device)
        return Batch(
            trajectory=self.trajectory[rows],
            prompt=self.prompt[rows],
            reward=self.reward[rows],
            log_q=None if self.log_q is None else self.log_q[rows],
            log_p=None if self.log_p is None else self.log_p[rows],
            mean_p=None if self.mean_p is None else self.mean_p[rows],
            kl=None if self.kl is None else self.kl[rows],
        )

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            trajectory=self.trajectory.to(device),
            prompt=self.prompt.to(device),
            reward=self.reward.to(device),
            log_q=None if self.log_q is None else self.log_q.to(device),
            log_p=None if self.log_p is None else self.log_p.to(device),
            mean_p=None if self.mean_p is None else self.mean_p.to(device),
            kl=None if self.kl is None else self.kl.to(device),
        )

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """Join batches; what is optional is known afterwards only if it was known in every part."""

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            known = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(known) if len(known) == len(parts) else None

        return Batch(
            trajectory=Trajectory.cat([part.trajectory for part in parts]),
            prompt=torch.cat([part.prompt for part in parts]),
            reward=torch.cat([part.reward for part in parts]),
            log_q=joined([part.log_q for part in parts]),
            log_p=joined([part.log_p for part in parts]),
            mean_p=joined([part.mean_p for part in parts]),
            kl=joined([part.kl for part in parts]),
        )
