"""A batch of trajectories with their rewards."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.rows import Rows
from diffusion_rtb.chain.trajectory import Trajectory

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch(Rows):
    """Trajectories with their prompts and rewards, on the host: only a micro-batch at a time is on the device."""

    trajectory: Trajectory
    prompt: Int[Tensor, " batch"]
    """Row of the run's prompt table."""
    reward: Float[Tensor, " batch"]
    log_q: Float[Tensor, "batch steps"] | None = None
    """Posterior log-density, None while it has to be computed, or where there is none (`Trajectory.has_density`); nats."""
    log_p: Float[Tensor, "batch steps"] | None = None
    """Prior log-density, likewise; nats."""
    mean_p: Float[Tensor, "batch steps *dims"] | None = None
    """Means of the prior's transitions, where an objective uses the closed-form KL."""
    kl: Float[Tensor, "batch steps"] | None = None
    """KL(q || p) of the transitions at these states in closed form, where an objective uses it; nats."""
    norm_q: Float[Tensor, "batch steps"] | None = None
    """`output_norm` of the posterior at each step, known with log_q where that was drawn or scored for itself."""
    norm_p: Float[Tensor, "batch steps"] | None = None
    """The same of the prior at these states."""
    log_z: Float[Tensor, " batch"] | None = None
    """Estimate of log Z by the particles that the trajectory was one of (`behaviours/steered.py`); nats."""
    estimate: Float[Tensor, "batch states"] | None = None
    """r of the prior's x0_hat at some of the states, where an objective reads it; reward units."""
    adjoint: Float[Tensor, "batch steps *dims"] | None = None
    """Of the state that each step leads to, for an objective that aims by it; nats per unit of x."""
    images: Float[Tensor, "batch *shape"] | None = None
    """What the reward saw, kept where it was asked for."""
