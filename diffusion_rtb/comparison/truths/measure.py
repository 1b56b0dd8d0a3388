"""All numbers of one sampler beside the truth: mode weights, W2, ELBO, ESS, KL, log Z."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.comparison.truths.transport import block_distances
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.estimates import (
    VAGUE,
    achieved_strength,
    elbo,
    ess,
    kl,
    log_z_importance,
    standard_error,
    strength_error,
    total_variation,
)
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.exact import ExactTarget, Modes
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["BATCH", "WITHIN", "draw_posterior", "look", "measured", "mode_distance", "mode_shares", "of_trajectories"]

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
) -> tuple[torch.Tensor, Drawn]:
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
    sampler = Sampler(prior, reward, prompts, BATCH, metadata)
    rows = [k % len(prompts) for k in range(count)]
    seeds = [seed_of(seed, "compare", k) for k in range(count)]
    wanted = count if scored is None else min(scored, count)
    vectors, kept = [], []
    for chunk in sampler.chunks(count):
        with truth.as_exact() if truth is not None and truth.as_exact is not None else nullcontext():
            found = sampler.draw(rows[chunk], seeds[chunk], images=True)
        assert found.images is not None
        vectors.append(found.images.flatten(1).double().cpu())
        if chunk.start < wanted:
            kept.append(Drawn.of_batch(sampler.completed(found[: wanted - chunk.start])))
    return torch.cat(vectors), Drawn.cat(kept)


def look(x: torch.Tensor, drawn: Drawn, target: ExactTarget, beta: float) -> dict[str, float]:
    """What a curve shows: TV and off where the target has modes, the ELBO and the KL, nats, where there are log-densities, and
    the mean reward.
    """
    numbers = {"reward": float(drawn.reward.double().mean())}
    if drawn.log_q is not None:
        numbers |= {"elbo": elbo(drawn.log_weights(beta)), "kl": kl(*drawn.densities)}
    if target.modes is not None:
        shares = mode_shares(x, target.modes)
        numbers |= {"tv": mode_distance(shares, target.modes), "off": float(shares[-1])}
    return numbers


def measured(x: torch.Tensor, drawn: Drawn, target: ExactTarget, beta: float) -> dict[str, Any]:
    """All numbers of a sampler as plain JSON values.

    `tv`, `off` and `shares` are absent where the target has no modes. `elbo` <= `exact_log_z`, with equality at the posterior;
    `log_z` is its importance-weighted estimate; `ess` a share in (0, 1]; `kl` that to the prior; nats, with `*_error` one standard
    error. `strength` and `r2` are those of `achieved_strength`, None where it has none, or with an error above `VAGUE`.
    """
    distance = block_distances(x, target.sample)
    numbers: dict[str, Any] = look(x, drawn, target, beta)
    if target.modes is not None:
        numbers["shares"] = mode_shares(x, target.modes).tolist()
    return (
        numbers
        | of_trajectories(drawn, beta)
        | {
            "w2": distance.mean,
            "w2_error": distance.standard_error,
            "exact_log_z": target.log_z,
            "samples": len(x),
        }
    )


def of_trajectories(drawn: Drawn, beta: float, prompt: Int[Tensor, " batch"] | None = None) -> dict[str, Any]:
    """What both log-densities of trajectories say, whatever the truth is; within prompts, or of all at once if `prompt` is None.

    Nothing, where a sampler without noise drew them.
    """
    if drawn.log_q is None:
        return {}
    log_q, log_p = drawn.densities
    log_w, ratio = drawn.log_weights(beta), (log_q.double() - log_p.double()).sum(1)
    strength, r2 = achieved_strength(ratio, drawn.reward, beta, drawn.prompt)
    if strength_error(ratio, drawn.reward, beta, drawn.prompt) > VAGUE:
        strength = r2 = math.nan
    return {
        "strength": strength if math.isfinite(strength) else None,
        "r2": r2 if math.isfinite(r2) else None,
        "elbo_error": standard_error(log_w, prompt),
        "kl_error": standard_error(ratio, prompt),
        "ess": ess(log_w, prompt),
        "log_z": log_z_importance(log_w, prompt),
    }


WITHIN = 4.0
"""Standard deviations from the nearest centre within which a sample counts for a mode; in 2-D 0.03 % of a mode are outside."""


def mode_shares(x: Float[Tensor, "batch dim"], modes: Modes) -> Float[Tensor, " modes_and_off"]:
    """Share of the samples that lie in each mode, and last the share that is "off", in none.

    Raises:
        ValueError: there are no samples, or they have another dimension than the modes.
    """
    if len(x) == 0 or x.shape[1] != modes.centres.shape[1]:
        raise ValueError(
            f"Samples of shape {tuple(x.shape)} cannot be counted into modes of {modes.centres.shape[1]} numbers each."
        )
    distance, index = torch.cdist(x.double().cpu(), modes.centres.double()).min(1)
    index = torch.where(distance <= WITHIN * modes.std, index, len(modes.centres))
    return torch.bincount(index, minlength=len(modes.centres) + 1).double() / len(x)


def mode_distance(shares: Float[Tensor, " modes_and_off"], modes: Modes) -> float:
    """Total variation between these shares and the true ones, which have nothing off; in [0, 1].

    Of n samples of the truth itself it is about sum_k sqrt(w_k / n) / 2.5, e.g. 0.01 for nine modes and n = 10,000.
    """
    if not math.isclose(float(modes.weights.sum()), 1.0, abs_tol=1e-5):
        raise ValueError(f"Weights of modes must sum to 1, got {modes.weights.tolist()}.")
    return total_variation(shares, torch.cat([modes.weights.double(), torch.zeros(1, dtype=torch.float64)]))
