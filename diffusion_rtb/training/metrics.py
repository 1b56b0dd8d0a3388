"""The numbers logged each iteration, of all processes together; the README explains each in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.estimates import achieved_strength, elbo, ess, kl, strength_error, tilt_moments, within_prompts
from diffusion_rtb.interfaces import Loss
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.processes import Processes

__all__ = [
    "Measured",
    "batch_metrics",
    "check_parity",
    "parity",
    "posterior_metrics",
    "realised",
    "reward_metrics",
    "update_metrics",
]


def realised(own: Measured) -> Float[Tensor, "3"]:
    """What q says of its beta: E[l], Cov(l, r) and Var(r) with l = log_q - log_p of trajectories, see `tilt_moments`.

    Args:
        own: The posterior's own trajectories, drawn without exploration noise: wider ones visit other states.
    """
    return tilt_moments(own.log_ratio.sum(1), own.reward, own.prompt)[:3]


def check_parity(parity: float, tolerance: float, iteration: int) -> None:
    """Refuse a gradient that was taken along another chain than the recorded one: a `parity` above the tolerance, in nats."""
    if parity > tolerance:
        raise ValueError(
            f"parity is {parity:.3g} nats at iteration {iteration}, above train.parity_tolerance={tolerance:g}: the "
            "replayed log-densities are not those of the rollout, so gradients would belong to another chain. Look for "
            "dropout, autocast or a reward that changes the pipeline; half-precision networks need a larger tolerance."
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """What the posterior's own trajectories say of it."""

    prompt: Int[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    log_ratio: Float[Tensor, "batch steps"]
    """log_q - log_p of each transition, float64, nats."""

    @staticmethod
    def of(own: Batch) -> Measured:
        """Of trajectories with both log-densities."""
        assert own.log_q is not None
        assert own.log_p is not None
        return Measured(own.prompt, own.reward.double(), own.log_q.double() - own.log_p.double())

    def gathered(self, processes: Processes) -> Measured:
        """Those of all processes, on the CPU, where statistics ask for many single numbers."""
        return Measured(*(x.cpu() for x in processes.gather(self.prompt, self.reward, self.log_ratio)))


def posterior_metrics(own: Measured, beta: float) -> dict[str, float]:
    """What an iteration says of the posterior, from its own trajectories without exploration noise; prompts have the same say."""
    profile, log_w = own.log_ratio.mean(0), beta * own.reward - own.log_ratio.sum(1)
    pairs = own.log_ratio.sum(1), own.reward, beta, own.prompt
    slope, r2 = achieved_strength(*pairs)
    strength = {"achieved_strength": slope, "strength_r2": r2, "strength_error": strength_error(*pairs)}
    return (
        reward_metrics(own.reward, own.prompt)
        | {
            "elbo": elbo(log_w, own.prompt),
            "kl": kl(own.log_ratio, torch.zeros_like(own.log_ratio), own.prompt),
            "ess": ess(log_w, own.prompt),
            "kl_peak_step": float(profile.abs().argmax()),
            "kl_peak_share": float(profile.abs().max() / profile.abs().sum().clamp(min=1e-12)),
        }
        | {name: value for name, value in strength.items() if math.isfinite(value)}
    )


def reward_metrics(reward: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]) -> dict[str, float]:
    """What samples say whose chains have no density; one alone has no spread."""
    spread = {"reward_std": float(reward.std(correction=0))} if len(reward) > 1 else {}
    return {"reward": within_prompts(lambda r: float(r.mean()), reward, prompt)} | spread


def update_metrics(
    parts: Mapping[str, Batch],
    loss: Loss | None,
    value: float,
    replayed: list[Float[Tensor, "_ steps"]],
    processes: Processes,
) -> dict[str, float]:
    """`batch_metrics`, or, where nobody scored a trajectory, what there is without: the value of the loss."""
    if loss is not None:
        return batch_metrics(parts, loss, replayed, processes)
    single = torch.tensor([[value]])
    others = _others(parts)
    single, *means = (x.cpu() for x in processes.gather(single, *others.values()))
    shares = {f"{name}_share_reward": float(values.mean()) for name, values in zip(others, means, strict=True)}
    return {"loss": float(single.mean()), "processes": float(processes.count)} | shares


def _others(parts: Mapping[str, Batch]) -> dict[str, Float[Tensor, " batch"]]:
    """Rewards of the behaviours besides the posterior."""
    return {name: part.reward.double() for name, part in parts.items() if name != "posterior"}


def batch_metrics(
    parts: Mapping[str, Batch], loss: Loss, replayed: list[Float[Tensor, "_ steps"]], processes: Processes
) -> dict[str, float]:
    """What an iteration says of the batch that was trained on: one part per behaviour, the posterior's first, with log_q.

    `replayed` is log_q of each part as the gradient pass saw it, 0 where a step was left out.
    """
    first = next(iter(parts.values()))
    assert first.log_q is not None
    device = loss.residual.device
    single = torch.tensor([[parity(first.log_q, replayed[0]), float(loss.loss.detach())]], device=device)
    others = _others(parts)
    estimates = {name: part.log_z.double() for name, part in parts.items() if part.log_z is not None}
    gathered = processes.gather(single, loss.residual, loss.log_z, *others.values(), *estimates.values())
    single, residual, log_z, *means = (x.cpu() for x in gathered)
    names = [*(f"{name}_share_reward" for name in others), *(f"log_z_{name}" for name in estimates)]
    shares = {name: float(values.mean()) for name, values in zip(names, means, strict=True)}
    return {
        "parity": float(single[:, 0].max()),
        "loss": float(single[:, 1].mean()),
        "log_z": float(log_z.mean()),
        "residual_mean": float(residual.mean()),
        "residual_std": float(residual.std(correction=0)),
        "processes": float(processes.count),
    } | shares


def parity(recorded: Float[Tensor, "batch steps"], replayed: Float[Tensor, "batch steps"]) -> float:
    """max |recorded - replayed| log_q over the steps that were replayed, in nats; 0 unless rollout and replay differ."""
    seen = (replayed != 0).any(0)
    return float((recorded - replayed)[:, seen].abs().max()) if bool(seen.any()) else 0.0
