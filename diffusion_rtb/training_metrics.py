"""The numbers logged each iteration; the README explains each in one line."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.actor import Experience
from diffusion_rtb.interfaces import Loss
from diffusion_rtb.metrics import elbo, ess, kl

__all__ = ["iteration_metrics", "parity"]


def iteration_metrics(
    parts: list[Experience], loss: Loss, replayed: list[Float[Tensor, "_ steps"]], beta: float
) -> dict[str, float]:
    """Metrics of one iteration.

    Args:
        parts: One batch per behaviour, the posterior's own trajectories first, both log-densities known.
        loss: The objective's answer on all of them.
        replayed: log_q of each part as the gradient pass saw it; 0 where a step was left out.
        beta: nats per unit of reward.
    """
    own = parts[0]
    assert own.log_q is not None
    assert own.log_p is not None
    log_ratio = (own.log_q - own.log_p).sum(1)
    weight = beta * own.reward.double() - log_ratio
    metrics = {
        "parity": parity(own.log_q, replayed[0]),
        "loss": float(loss.loss.detach()),
        "reward": float(own.reward.double().mean()),
        "reward_std": float(own.reward.double().std(correction=0)),
        "elbo": float(elbo(own.reward.double(), own.log_q, own.log_p, beta)),
        "kl": float(kl(own.log_q, own.log_p)),
        "ess": float(ess(weight)),
        "log_z": float(loss.log_z.mean()),
        "residual_mean": float(loss.residual.mean()),
        "residual_std": float(loss.residual.std(correction=0)),
    }
    if len(parts) > 1:
        metrics["prior_share_reward"] = float(parts[1].reward.double().mean())
    profile = (own.log_q - own.log_p).mean(0)
    metrics["kl_peak_step"] = float(profile.abs().argmax())
    metrics["kl_peak_share"] = float(profile.abs().max() / profile.abs().sum().clamp(min=1e-12))
    return metrics


def parity(recorded: Float[Tensor, "batch steps"], replayed: Float[Tensor, "batch steps"]) -> float:
    """max |recorded - replayed| log_q over the steps that were replayed, in nats; 0 unless rollout and replay differ."""
    seen = (replayed != 0).any(0)
    return float((recorded - replayed)[:, seen].abs().max()) if bool(seen.any()) else 0.0
