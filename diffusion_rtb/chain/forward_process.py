"""The forward process of a scheduler: x_t given x_0, the whole chain x_t, …, x_T given x_0, and the mean of x_0 given x_t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.host_schedule import place_in
from diffusion_rtb.chain.recordable import samples_flows
from diffusion_rtb.chain.scheduler import unchanged
from diffusion_rtb.needs import Kind, instead

__all__ = [
    "Forward",
    "denoised",
    "knowing",
    "network_predicts",
    "noised",
    "noised_chain",
    "signal_and_noise",
    "transition",
]


def noised(
    scheduler: Any,
    x_0: Float[Tensor, "batch *dims"],
    timesteps: Float[Tensor, " batch"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *dims"]:
    """x_t ~ q(x_t | x_0) of each sample at its own timestep, e.g. sqrt(a)·x_0 + sqrt(1 - a)·noise with a = alpha_bar_t.

    Args:
        scheduler: Whose `add_noise` (or `scale_noise`, flow matching) is asked; its timesteps must be set.
        x_0: Clean samples.
        timesteps: Of that scheduler.
        generator: On the CPU.

    Raises:
        ValueError: the scheduler has no forward process.
    """
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    return _added(scheduler, x_0, noise, timesteps)


def noised_chain(
    scheduler: Any,
    x_0: Float[Tensor, "batch *dims"],
    timesteps: Float[Tensor, " states"],
    noise: Float[Tensor, "batch states *dims"],
) -> Float[Tensor, "batch states *dims"]:
    r"""States of one forward chain each, as a trajectory has them: the noisiest first, x_0 itself not among them.

        x_s = a_s·x_0 + b_s·noise                                          the last one, from x_0
        x_t = (a_t/a_s)·x_s + sqrt(b_t² - (a_t/a_s)²·b_s²)·noise            each before it, from the one after it

    so that every state has the scheduler's q(x_t | x_0) and neighbours belong together. (States noised apart from each other would
    not: their transitions would be wildly unlikely under any denoiser.) It is the reversal of the prior's chain where that is
    well trained, of many steps, and memoryless (eta 1).

    Args:
        scheduler: Whose `add_noise` (or `scale_noise`) is asked; its timesteps must be set.
        x_0: Clean samples.
        timesteps: Of that scheduler, decreasing.
        noise: Standard normal.

    Raises:
        ValueError: the scheduler has no forward process, or one whose signal comes back.
    """
    a, b = signal_and_noise(scheduler, timesteps)
    x, a_s, b_s, states = x_0, 1.0, 0.0, []
    for i in reversed(range(len(timesteps))):
        kept, own = transition(scheduler, (a_s, b_s), (float(a[i]), float(b[i])))
        x = kept * x + own * noise[:, i].to(x)
        states.append(x)
        a_s, b_s = float(a[i]), float(b[i])
    return torch.stack(states[::-1], dim=1)


def signal_and_noise(
    scheduler: Any, timesteps: Float[Tensor, " states"]
) -> tuple[Float[Tensor, " states"], Float[Tensor, " states"]]:
    """a_t and b_t of x_t = a_t·x_0 + b_t·noise, as the scheduler itself answers them; float64.

    Where the timesteps are a part of its schedule, a state is its place there: rounded schedules repeat timesteps.

    Raises:
        ValueError: the scheduler has no forward process.
    """
    zero, one = (
        fill(len(timesteps), 1, dtype=torch.float64, device=timesteps.device) for fill in (torch.zeros, torch.ones)
    )
    schedule = getattr(scheduler, "timesteps", None)
    repeated = len(timesteps.unique()) < len(timesteps) and hasattr(scheduler, "_begin_index")
    first = place_in(schedule, timesteps) if repeated and schedule is not None else None
    if first is None:
        a, b = _added(scheduler, one, zero, timesteps), _added(scheduler, zero, one, timesteps)
        return a[:, 0].double(), b[:, 0].double()
    pairs = [
        [_added(scheduler, x[i], noise[i], timesteps[i : i + 1], first + i) for x, noise in ((one, zero), (zero, one))]
        for i in range(len(timesteps))
    ]
    both = torch.stack([torch.cat(pair) for pair in pairs]).double()
    return both[:, 0], both[:, 1]


PREDICTIONS = ("epsilon", "v_prediction", "sample")


def network_predicts(scheduler: Any, asked_by: Kind = "steering") -> str:
    """What a scheduler takes the network's output for: "epsilon", "v_prediction", "sample" or "velocity", that of a flow.

    Args:
        scheduler: Of a pipeline.
        asked_by: The kind of method that needs it, for the error's remedy.

    Raises:
        ValueError: something else, so that x_0 is not known from it.
    """
    if samples_flows(scheduler):
        return "velocity"
    kind = str(getattr(scheduler, "config", {}).get("prediction_type"))
    if kind not in PREDICTIONS or hasattr(scheduler, "precondition_outputs"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r}: the estimate of x_0 from x_t is known for networks that "
            f"predict {', '.join(PREDICTIONS)} or the velocity of a flow. {instead('estimate', asked_by)}"
        )
    return kind


def denoised(
    predicts: str, x_t: Float[Tensor, "batch *dims"], output: Float[Tensor, "batch *dims"], a: float, b: float
) -> Float[Tensor, "batch *dims"]:
    r"""x0_hat = E[x_0 | x_t] by Tweedie's formula, from what the network predicts at x_t = a·x_0 + b·noise; differentiable.

        epsilon         (x_t - b·e) / a
        velocity        x_t - b·u                                   u = noise - x_0, a = 1 - b
        v_prediction    (a·x_t - b·n·v) / n²,  n² = a² + b²         v = (a·noise - b·x_0) / n, of x_t / n
        sample          the output itself

    Args:
        predicts: See `network_predicts`.
        x_t: States, as the scheduler's `step` is given them.
        output: What the pipeline gives the scheduler, guided.
        a: Signal; `signal_and_noise`.
        b: Noise.

    Source: Efron 2011, https://doi.org/10.1198/jasa.2011.tm11181
    """
    if predicts == "epsilon":
        return (x_t - b * output) / a
    if predicts == "velocity":
        return x_t - b * output
    n = math.hypot(a, b)
    return (a * x_t - b * n * output) / n**2 if predicts == "v_prediction" else output


def knowing(
    predicts: str,
    x_0: Float[Tensor, "batch *dims"],
    x_t: Float[Tensor, "batch *dims"],
    a: float,
    b: float,
) -> Float[Tensor, "batch *dims"]:
    r"""What a network that knows x_0 would answer at x_t = a·x_0 + b·noise: the inverse of `denoised`.

        epsilon         (x_t - a·x_0) / b                           the noise
        velocity        (x_t - x_0) / b                             noise - x_0, a = 1 - b
        v_prediction    (a·noise - b·x_0) / n,  n² = a² + b²
        sample          x_0

    A scheduler's own step makes of it the mean of x_t -> x_s given x_0, whatever its noise; for DDIM and DDPM
    E[x_s | x_t, x_0] of the forward process run backwards (equation 7 of Song et al. 2020, https://arxiv.org/abs/2010.02502). Steps
    are linear in the network's answer, so that the mean over x_0 is the step of the network that answers the mean.

    Args:
        predicts: See `network_predicts`.
        x_0: The clean end.
        x_t: A state of the forward process from there.
        a: Signal; `signal_and_noise`.
        b: Noise, above 0.
    """
    if predicts == "sample":
        return x_0
    if predicts == "velocity":
        return (x_t - x_0) / b
    noise = (x_t - a * x_0) / b
    return noise if predicts == "epsilon" else (a * noise - b * x_0) / math.hypot(a, b)


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward process at the states of a chain, in the terms of its network."""

    predicts: str
    levels: Sequence[tuple[float, float]]
    """(a_t, b_t) of each state but x_0."""

    @staticmethod
    def of(scheduler: object, timesteps: Float[Tensor, " steps"]) -> Forward:
        """That of a scheduler; ValueError: it has none, or what its network predicts is not known."""
        a, b = signal_and_noise(scheduler, timesteps)
        return Forward(network_predicts(scheduler), list(zip(a.tolist(), b.tolist(), strict=True)))


def transition(scheduler: Any, s: tuple[float, float], t: tuple[float, float]) -> tuple[float, float]:
    """x_t = kept·x_s + own·noise from (a, b) of both. ValueError: the signal comes back."""
    kept = t[0] / s[0] if s[0] > 0 else 0.0
    own = t[1] ** 2 - (kept * s[1]) ** 2
    if kept > 1 + 1e-6 or own < -1e-6:
        raise ValueError(
            f"{type(scheduler).__name__} keeps {t[0]:.4g} of x_0 at a noisier timestep than where it keeps {s[0]:.4g}: this is no "
            "forward process that can be run step by step."
        )
    return kept, max(0.0, own) ** 0.5


def _added(
    scheduler: Any,
    x_0: Float[Tensor, "*batch_and_dims"],
    noise: Float[Tensor, "*batch_and_dims"],
    timesteps: Float[Tensor, " batch"],
    place: int | None = None,
) -> Float[Tensor, "*batch_and_dims"]:
    """The scheduler's own answer; at a place in its schedule instead of a timestep where that is given."""
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        raise ValueError(
            f"{type(scheduler).__name__} has neither add_noise nor scale_noise, so states cannot be noised; use recorded ones."
        )
    with unchanged(scheduler):
        # After a chain some schedulers ignore the timesteps: they take the question for one about the step they are at.
        vars(scheduler).update({name: None for name in ("_begin_index", "_step_index") if hasattr(scheduler, name)})
        if place is not None:
            scheduler._begin_index = place
        if hasattr(scheduler, "add_noise"):
            whole = bool((timesteps == timesteps.round()).all())
            answer: Tensor = scheduler.add_noise(x_0, noise, timesteps.long() if whole else timesteps)
        else:
            answer = scheduler.scale_noise(x_0, timesteps, noise)
    return answer
