"""All numbers of one sampler beside the truth: mode weights, W2, ELBO, ESS, KL, log Z."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from diffusion_rtb.actor import Actor, Experience
from diffusion_rtb.comparison.exact import ExactTarget
from diffusion_rtb.comparison.mode_weights import mode_distance, mode_shares
from diffusion_rtb.comparison.wasserstein import block_distances
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.metrics import elbo, ess, kl, log_weights, log_z_importance, standard_error
from diffusion_rtb.prompts import Metadata
from diffusion_rtb.seeds import seed_of

__all__ = ["BATCH", "draw_posterior", "look", "measured"]

BATCH = 2000
"""Samples per pipeline call; memory, not results."""


def draw_posterior(
    prior: Prior,
    reward: Reward,
    prompts: Sequence[str],
    count: int,
    seed: int,
    *,
    truth: ExactTarget | None = None,
    scored: int | None = None,
    metadata: Sequence[Metadata] | None = None,
) -> tuple[torch.Tensor, Experience]:
    """Decoded samples of the posterior as it is now, or of the truth through the same chain, at the same noise.

    Args:
        prior: With its posterior attached.
        reward: r(x).
        prompts: The samples take turns at them.
        count: Samples.
        seed: Of the noise.
        truth: Draw with its exact denoiser instead of the posterior's; scored by that, too.
        scored: How many of them get log_p as well; None: all.
        metadata: What is known of each prompt, for a reward that takes it.

    Returns:
        Vectors (count, dim) in data units, float64, and the first `scored` trajectories with log_q and log_p, without their states.
    """
    actor = Actor(prior, reward, prompts, BATCH, metadata)
    rows = [k % len(prompts) for k in range(count)]
    seeds = [seed_of(seed, "compare", k) for k in range(count)]
    wanted = count if scored is None else min(scored, count)
    vectors, kept = [], []
    for chunk in actor.chunks(count):
        with truth.as_exact() if truth is not None and truth.as_exact is not None else nullcontext():
            found = actor.from_posterior(rows[chunk], seeds[chunk])
        vectors.append(prior.decode(found.trajectory.x_0).flatten(1).double().cpu())
        if chunk.start < wanted:
            kept.append(actor.completed(found[: wanted - chunk.start]).to("cpu"))
    return torch.cat(vectors), Experience.cat(kept)


def look(x: torch.Tensor, drawn: Experience, target: ExactTarget, beta: float) -> dict[str, float]:
    """What a curve shows: TV and off where the target has modes, and the ELBO; nats."""
    numbers = {"elbo": _elbo(drawn, beta)}
    if target.modes is not None:
        shares = mode_shares(x, target.modes)
        numbers |= {"tv": mode_distance(shares, target.modes), "off": float(shares[-1])}
    return numbers


def measured(x: torch.Tensor, drawn: Experience, target: ExactTarget, beta: float) -> dict[str, Any]:
    """All numbers of a sampler as plain JSON values.

    `tv`, `off` and `shares` are absent where the target has no modes. `elbo` <= `exact_log_z`, with equality at the posterior;
    `log_z` is its importance-weighted estimate; `ess` a share in (0, 1]; `kl` that to the prior; nats, with `*_error` one standard
    error.
    """
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    log_w = log_weights(drawn.reward, drawn.log_q, drawn.log_p, beta)
    distance = block_distances(x, target.sample)
    numbers: dict[str, Any] = look(x, drawn, target, beta)
    if target.modes is not None:
        numbers["shares"] = mode_shares(x, target.modes).tolist()
    return numbers | {
        "w2": distance.mean,
        "w2_error": distance.standard_error,
        "elbo_error": standard_error(log_w),
        "ess": ess(log_w),
        "kl": kl(drawn.log_q, drawn.log_p),
        "kl_error": standard_error(drawn.log_q.double().sum(1) - drawn.log_p.double().sum(1)),
        "log_z": log_z_importance(log_w),
        "exact_log_z": target.log_z,
        "samples": len(x),
    }


def _elbo(drawn: Experience, beta: float) -> float:
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    return elbo(drawn.reward, drawn.log_q, drawn.log_p, beta)
