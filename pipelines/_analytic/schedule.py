r"""The noise schedule of the vector priors, as stock schedulers, and what a scheduler does with a predicted noise.

    log(alpha_bar / (1 - alpha_bar)) = centre + width·sinh(y),   y linear from the noisy to the clean end

Steps lie densest where the log signal-to-noise ratio is near `centre`. That matters with few steps: a chain of Normal transitions
of fixed variance cannot follow the posterior exactly, and what it misses is largest where modes part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.config.component_errors import nearest
from pipelines._diffusers.scheduler import takes_eta

__all__ = ["SCHEDULERS", "Schedule", "StepCoefficients", "build_vector_scheduler", "step_coefficients"]

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")


@dataclass(frozen=True)
class Schedule:
    """alpha_bar at the ends, sqrt(alpha_bar_T) = signal and sqrt(1 - alpha_bar_0) = noise, and where steps are dense."""

    signal: float = 0.1
    """What is left of the data in x_T; x_T is drawn from N(0, I) all the same. Small, but not so that steps get long."""
    noise: float = 0.02
    """Standard deviation of the noise that stays in x_0; in units of the standardised data."""
    centre: float = 0.0
    """Log signal-to-noise ratio around which the steps are densest."""
    width: float = 2.0
    """How far around it, in the same units; large spaces the log signal-to-noise ratio evenly."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"schedule.{name} is {value}: give a finite number.")
        if not (0 < self.signal < 1 and 0 < self.noise < 1 and self.signal**2 < 1 - self.noise**2):
            raise ValueError(
                f"schedule: signal {self.signal:g} and noise {self.noise:g} must lie in (0, 1) with signal² < 1 - noise², "
                "for example 0.1 and 0.02."
            )
        if self.width <= 0:
            raise ValueError(f"schedule.width is {self.width:g}: it must be positive, for example 0.5.")

    @staticmethod
    def of(given: Mapping[str, float] | None, default: Schedule) -> Schedule:
        """`default` with what is given in its place.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        known = asdict(default)
        for key in given or {}:
            if key not in known:
                raise ValueError(f"schedule has no {key!r}.{nearest(key, known)} It has {', '.join(known)}.")
        return Schedule(**known | {key: float(value) for key, value in (given or {}).items()})

    def alpha_bar(self, steps: int) -> Float[Tensor, " steps_and_one"]:
        """By timestep: alpha_bar_0 of x_0 first, alpha_bar_T of x_T last; float64."""
        signal2, clean2 = self.signal**2, 1 - self.noise**2
        ends = [math.log(a / (1 - a)) for a in (clean2, signal2)]
        first, last = (math.asinh((ratio - self.centre) / self.width) for ratio in ends)
        y = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        return torch.sigmoid(self.centre + self.width * torch.sinh(y))


def build_vector_scheduler(name: str, schedule: Schedule, steps: int) -> Any:
    """A stock scheduler whose timesteps are T, …, 1.

    DDIM ends at alpha_bar_0, and every step of it is stochastic. DDPM goes on to the prediction of x_0 itself: its last step is
    a deterministic map, for prior and posterior alike.

    Raises:
        ValueError: no such scheduler here, or fewer than 2 steps.
    """
    check_scheduler(name, steps)
    import diffusers

    alpha_bar = schedule.alpha_bar(steps)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    options: dict[str, Any] = {"trained_betas": betas.tolist(), "num_train_timesteps": steps + 1, "clip_sample": False}
    options |= {"timestep_spacing": "leading", "steps_offset": 1}
    options |= {"set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    return getattr(diffusers, name)(**options)


def check_scheduler(name: str, steps: int) -> None:
    """Refuse schedulers whose chain the closed forms do not describe, and chains without a first and a last step."""
    if name not in SCHEDULERS:
        hint = f"{nearest(name, SCHEDULERS)} Choose one of {', '.join(SCHEDULERS)}."
        raise ValueError(f"scheduler={name!r} is not one that the vector priors run with.{hint}")
    if steps < 2:
        raise ValueError(f"steps={steps}: a chain needs at least 2 steps, for example 50.")


@dataclass(frozen=True, eq=False)
class StepCoefficients:
    """x_s = by_x·x_t + by_noise·prediction + std·z, step by step from x_T on; float64."""

    timesteps: list[int]
    by_x: Float[Tensor, " steps"]
    by_noise: Float[Tensor, " steps"]
    std: Float[Tensor, " steps"]


@torch.no_grad()
def step_coefficients(scheduler: Any, steps: int, eta: float) -> StepCoefficients:
    """What the scheduler's own `step` does, asked for with x_t and the predicted noise at 0 and 1: no formula is repeated here."""
    scheduler.set_timesteps(steps)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    options = {"eta": eta} if takes_eta(scheduler) else {}

    def asked(prediction: Tensor, t: Tensor, x_t: Tensor) -> tuple[float, float]:
        call = StepCall(scheduler, scheduler.step, prediction, t, x_t, **options)
        mean = previous_sample(call.mean())
        return float(mean), call.std(mean)

    rows = [(asked(zero, t, one)[0], asked(one, t, zero)[0], asked(zero, t, zero)[1]) for t in scheduler.timesteps]
    by_x, by_noise, std = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return StepCoefficients(scheduler.timesteps.tolist(), by_x, by_noise, std)
