r"""How good a posterior is, in nats: pure functions of small tensors, float64 inside.

One identity ties them together. With w(τ) = exp(beta·r − (log_q − log_p)) the importance weight of a posterior trajectory,

    log Z = ELBO + KL(q || p*),    ELBO = E_q[log w] <= log E_q[w] = log Z = log E_p[exp(beta·r)]

so a posterior that is right has ELBO = log Z (both estimates of it), ESS 1 and a residual without spread. A posterior
that has collapsed onto one mode looks healthy on its own samples; only `log_z_from_prior` next to the ELBO exposes it.

Every function that averages over trajectories takes `prompt`, the prompt of each trajectory: log Z differs between
prompts, so what is not linear in the trajectories is computed within each prompt and then averaged over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "VAGUE",
    "achieved_strength",
    "elbo",
    "ess",
    "kl",
    "kl_profile",
    "log_weight",
    "log_weights",
    "log_z_from_prior",
    "log_z_importance",
    "norm_ratio",
    "refuse_nan",
    "reweighted_mean",
    "reweighted_shares",
    "standard_error",
    "strength_error",
    "tilt_moments",
    "total_variation",
    "within_prompts",
]


def within_prompts(
    statistic: Callable[[Tensor], float], values: Float[Tensor, "batch *rest"], prompt: Int[Tensor, " batch"] | None
) -> float:
    """Mean over prompts of `statistic(values of that prompt)`; over everything at once when `prompt` is None.

    Raises:
        ValueError: `values` is empty or holds NaN.
    """
    if len(values) == 0:
        raise ValueError("A statistic needs at least one value, got none. Evaluate with one sample per prompt or more.")
    refuse_nan(values)
    values = values.detach().double()
    if prompt is None:
        return statistic(values)
    parts = [statistic(values[prompt == row]) for row in prompt.unique().tolist()]
    return math.fsum(parts) / len(parts)


def log_weights(
    reward: Float[Tensor, " batch"],
    log_q: Float[Tensor, "batch steps"],
    log_p: Float[Tensor, "batch steps"],
    beta: float,
) -> Float[Tensor, " batch"]:
    """`log_weight` of each posterior trajectory, in float64 and without a graph; nats.

    At the exact posterior log w = log Z for every trajectory of one prompt.
    """
    return log_weight(log_q.detach().double(), log_p.detach().double(), reward.detach().double(), beta)


def elbo(log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"] | None = None) -> float:
    """ELBO = E_q[beta·r − (log_q − log_p)] <= log Z, nats: the lower bound on log Z that training raises."""
    return within_prompts(_mean, log_w, prompt)


def kl(
    log_q: Float[Tensor, "batch steps"],
    log_p: Float[Tensor, "batch steps"],
    prompt: Int[Tensor, " batch"] | None = None,
) -> float:
    """KL(q || p) = E_q[log_q − log_p] over whole trajectories, nats; an unbiased estimate, so it may dip below 0."""
    return within_prompts(_mean, _log_ratio(log_q, log_p).sum(1), prompt)


def kl_profile(log_q: Float[Tensor, "batch steps"], log_p: Float[Tensor, "batch steps"]) -> Float[Tensor, " steps"]:
    """E_q[log_q − log_p] of each step, nats; sums to `kl`. Shows which noise levels carry the change."""
    return _log_ratio(log_q, log_p).mean(0)


def norm_ratio(
    norm_q: Float[Tensor, "batch steps"],
    norm_p: Float[Tensor, "batch steps"],
    prompt: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " steps"]:
    """E_q[|e_q(x_t, t)| / |e_p(x_t, t)|] of each step, mean over prompts: 1 where the network answers as loudly as the prior's.

    e is what the scheduler is given (predicted noise, velocity or x_0, guided), both at the posterior's own states. A reward that
    is being hacked often makes it louder, before the pictures show it. NaN for a step without a density, whose norms are 0.

    Args:
        norm_q: |e_q|, Euclidean over all dimensions (`Batch.norm_q`).
        norm_p: |e_p| at the same states (`Batch.norm_p`).
        prompt: Of each trajectory.

    Source: the norm of the velocity as a sign of hacking, NormGuard 2026, https://arxiv.org/abs/2606.27771
    """
    ratio = norm_q.detach().double() / norm_p.detach().double()
    rows = torch.zeros(len(ratio), dtype=torch.long) if prompt is None else prompt
    return torch.stack([ratio[rows == row].mean(0) for row in rows.unique().tolist()]).mean(0)


def tilt_moments(
    log_ratio: Float[Tensor, " batch"], reward: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"]
) -> Float[Tensor, "4"]:
    """E[l], Cov(l, r), Var(r) and Var(l) within each prompt, mean over prompts; l = log_q - log_p of a trajectory.

    E[l] is KL(q || p). At p(x)·exp(b·r(x)) / Z it is l = b·r - log Z, so Cov / Var(r) is b, whatever Z.
    """
    moments = []
    for row in torch.unique(prompt):
        here = (prompt == row).nonzero().flatten()
        r, ratio = reward[here], log_ratio[here]
        centred = r - r.mean()
        spread = (ratio - ratio.mean()).square().mean()
        moments.append(torch.stack([ratio.mean(), (centred * ratio).mean(), centred.square().mean(), spread]))
    return torch.stack(moments).mean(0)


def achieved_strength(
    log_ratio: Float[Tensor, " batch"], reward: Float[Tensor, " batch"], beta: float, prompt: Int[Tensor, " batch"]
) -> tuple[float, float]:
    """Slope and r² of log_q - log_p of whole posterior trajectories on beta·r, the means of their own prompt removed from both.

        slope = Cov(l, beta·r) / Var(beta·r)        r² = Cov(l, r)² / (Var(l)·Var(r))        (moments of `tilt_moments`)

    The slope is the share of the asked-for tilt that is there: where beta is 2 and the slope 0.65, the posterior is that of
    beta 1.3. 1 - r² is the share of what the chain moved that the reward does not explain. Both are 1 at the exact posterior.
    NaN where rewards do not vary within a prompt, or, r², where q is p.

    Raises:
        ValueError: a NaN is among them.
    """
    ratio, r = log_ratio.detach().double(), reward.detach().double()
    for values in (ratio, r):
        refuse_nan(values)
    _, covariance, variance, spread = tilt_moments(ratio, r, prompt).tolist()
    # Equal numbers differ from their mean by a rounding.
    rounding = [(1e-12 * float(values.abs().max())) ** 2 for values in (r, ratio)]
    if variance <= rounding[0]:
        return math.nan, math.nan
    r2 = covariance**2 / (variance * spread) if spread > rounding[1] else math.nan
    return covariance / (beta * variance), r2


VAGUE = 0.5
"""Standard error of the slope from where on its interval of 95 % is wider than from none of the tilt to twice of it: rewards of a
prompt that are nearly equal make a slope of any size, which tells nothing."""


def strength_error(
    log_ratio: Float[Tensor, " batch"], reward: Float[Tensor, " batch"], beta: float, prompt: Int[Tensor, " batch"]
) -> float:
    """Standard error of the slope of `achieved_strength`: that of least squares, whose noise is alike at all rewards.

        sqrt( (Var(l) - Cov(l, beta·r)² / Var(beta·r)) / (Var(beta·r)·(n - prompts - 1)) )

    The noise of l over the spread of beta·r: where a prompt's rewards are nearly equal it says that the slope is none. NaN where
    there is no slope, or no sample is left to tell its noise.
    """
    ratio, r = log_ratio.detach().double(), reward.detach().double()
    _, covariance, variance, spread = tilt_moments(ratio, r, prompt).tolist()
    left = len(r) - len(torch.unique(prompt)) - 1
    if left < 1 or variance <= (1e-12 * float(r.abs().max())) ** 2:
        return math.nan
    return math.sqrt(max(0.0, spread - covariance**2 / variance) / (beta**2 * variance * left))


def log_z_importance(log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"] | None = None) -> float:
    """log mean exp(log w), nats: log Z from posterior trajectories, at least the ELBO of the same ones."""
    return within_prompts(_log_mean_exp, log_w, prompt)


def log_z_from_prior(
    reward: Float[Tensor, " batch"], beta: float, prompt: Int[Tensor, " batch"] | None = None
) -> float:
    """log E_p[exp(beta·r)] from prior samples, nats: blind to what the posterior misses or invents."""
    return within_prompts(_log_mean_exp, beta * reward.detach().double(), prompt)


def ess(log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"] | None = None) -> float:
    """Effective sample size as a share: (sum w)² / (n·sum w²), in (0, 1]; 1 if and only if all weights are equal."""
    return within_prompts(_ess, log_w, prompt)


def reweighted_mean(
    values: Float[Tensor, " batch"], log_w: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"] | None = None
) -> float:
    """sum w·values / sum w: what `values` average to under the re-weighted distribution (self-normalised)."""
    pairs = torch.stack([values.detach().double(), log_w.detach().double()], dim=1)
    return within_prompts(lambda v: float((torch.softmax(v[:, 1], 0) * v[:, 0]).sum()), pairs, prompt)


def standard_error(values: Float[Tensor, " batch"], prompt: Int[Tensor, " batch"] | None = None) -> float:
    """Standard error of the mean over prompts of the within-prompt means: sqrt(sum_g var_g/n_g) / G."""
    values = values.detach().double()
    rows = torch.zeros(len(values), dtype=torch.long) if prompt is None else prompt
    groups = [values[rows == row] for row in rows.unique().tolist()]
    if any(len(group) < 2 for group in groups):
        return math.nan  # one value per prompt says nothing about spread
    return math.sqrt(math.fsum(float(group.var()) / len(group) for group in groups)) / len(groups)


def total_variation(p: Float[Tensor, " classes"], q: Float[Tensor, " classes"]) -> float:
    """Total variation distance ½·sum |p − q| of two distributions over the same classes, in [0, 1].

    Raises:
        ValueError: `p` or `q` is not a distribution.
    """
    for name, values in (("p", p), ("q", q)):
        total = float(values.double().sum())
        if not math.isclose(total, 1.0, abs_tol=1e-5) or bool((values < 0).any()):
            raise ValueError(
                f"{name} must be non-negative and sum to 1, got {values.tolist()}; divide counts by their sum."
            )
    # The sum of p and q may differ from 1 by rounding; the bound must not.
    return min(1.0, 0.5 * float((p.double() - q.double()).abs().sum()))


def reweighted_shares(
    labels: Int[Tensor, " batch"],
    classes: int,
    log_w: Float[Tensor, " batch"] | None,
    prompt: Int[Tensor, " batch"],
) -> Float[Tensor, "prompts classes"]:
    """Share of each class among the samples of each prompt, weighted by w / sum w within the prompt (None: w = 1).

    The mean over rows gives every prompt the same say. Rows follow the sorted prompts.

    Raises:
        ValueError: a label is outside 0 … classes − 1.
    """
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"Labels must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}.")
    logs = torch.zeros(len(labels), dtype=torch.float64) if log_w is None else log_w.detach().double()
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    rows = [prompt == row for row in prompt.unique().tolist()]
    return torch.stack([torch.softmax(logs[row], 0) @ one_hot[row] for row in rows])


def refuse_nan(values: Tensor) -> None:
    """ValueError: a NaN is among them; the message says where."""
    if values.isnan().any():
        rows = values.flatten(1).isnan().any(1) if values.ndim > 1 else values.isnan()
        raise ValueError(f"A statistic of NaN is meaningless; NaN at rows {rows.nonzero().flatten().tolist()[:8]}.")


def _log_ratio(log_q: Tensor, log_p: Tensor) -> Tensor:
    # Differences step by step, in float64: the two log-densities are large and nearly equal.
    return log_q.detach().double() - log_p.detach().double()


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _log_mean_exp(values: Tensor) -> float:
    return float(torch.logsumexp(values, 0)) - math.log(len(values))


def _ess(log_w: Tensor) -> float:
    # Scaled by the largest weight, so that n equal weights give exactly 1 whatever their size.
    w = (log_w - log_w.max()).exp()
    return min(1.0, float(w.sum() ** 2 / (w.square().sum() * len(w))))


def log_weight(
    log_q: Float[Tensor, "batch steps"],
    log_p: Float[Tensor, "batch steps"],
    reward: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, " batch"]:
    """log w = beta·r - sum_t (log_q - log_p), the one-sample estimate of log Z; nats."""
    # Step by step first: each log-density is large (thousands of nats), their differences are not, and float32 keeps
    # the difference of two neighbours exactly but not the difference of two sums.
    return beta * reward - (log_q - log_p).sum(dim=1)
