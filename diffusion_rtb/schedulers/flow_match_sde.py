r"""Sample a flow-matching pipeline with noise and keep the model's own distribution: a drop-in for its Euler scheduler.

In diffusers' letters x_t = (1 - t)·x_0 + t·e with t = sigma, 1 is noise, and the network answers u = E[e - x_0 | x_t]; so
x̂ = x - t·u estimates x_0 and ê = x + (1 - t)·u the noise. Flows are sampled by an ordinary differential equation, whose
transitions have no density. The same marginals have a family of stochastic ones, one for each noise level.

Marginal-preserving SDE: Song et al., 2021, https://arxiv.org/abs/2011.13456; its Euler steps as a policy: Flow-GRPO, Liu et al.,
2025, https://arxiv.org/abs/2505.05470. Memoryless noise: Domingo-Enrich et al., 2025, https://arxiv.org/abs/2409.08861.
Windows: MixGRPO, Li et al., 2025, https://arxiv.org/abs/2507.21802.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# Where diffusers loads a saved pipeline it looks for this base class beside a class that is not its own.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["FlowMatchSDEScheduler"]

MEMORYLESS = {"marginal": math.sqrt(2), "posterior": 1.0}
"""The noise level of each kernel at which x_0 does not depend on x_T."""

LARGEST = {"marginal": 2.0, "posterior": 1.0}
"""Above 2 an Euler step of the SDE overshoots; above 1 the posterior has no such deviation."""


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    r"""Transitions x_t -> x_s of a flow, s < t, that are Gaussian and leave the distribution of x_0 the model's own.

        pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config)

    kernel "marginal", an Euler step of the SDE with the flow's marginals:

        x_s = x + [u + sigma²/(2t)·ê]·(s - t) + sigma·sqrt(t - s)·z,     sigma = a·sqrt(t / max(1 - t, t - s))

    kernel "posterior", that of the interpolation (DDIM with eta a; at a = 1 SDE-DPM-Solver++ of order 1 on flow sigmas):

        x_s = (1 - s)·x̂ + sqrt(s² - std²)·ê + std·z,     std = a·s·sqrt(1 - ((1 - t)·s / ((1 - s)·t))²)

    with the noise level a. The last step, to s = 0, is x_0 = x̂ without noise in both.

    Args:
        noise_level: a; None is the level without memory: sqrt 2 for "marginal", 1 for "posterior". Below it x_0 depends on
            x_T, so that one log Z per prompt does not fit. At 0 steps and schedule are those of the stock scheduler, bit for bit.
        kernel: "marginal" has the right spread from few steps on, but its early states are wider than those the network was
            trained on; "posterior" is narrower than the model at few steps.
        window: (start, stop): noise in the steps start, …, stop - 1 of the schedule, the ODE in all others; None: everywhere.
            log Z then depends on the state at the window's start, and steps of the ODE are maps of the network they are run with.
        num_train_timesteps: This and all others are those of `FlowMatchEulerDiscreteScheduler`.

    Unless the pipeline passes sigmas, they are linspace(1, 1/T, T) before the shift: the stock schedule ends with a step of
    deviation 0.001, whose log-density weighs a million times that of the others. Noise comes from `torch.randn`; `step` takes one
    generator per row, and then no sample depends on its batch.

    Raises:
        ValueError: `noise_level`, `kernel` or `window` is none of the above; `stochastic_sampling` or `invert_sigmas` is set.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        noise_level: float | None = None,
        kernel: str = "marginal",
        window: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        check_settings(kernel, noise_level, window)
        if stochastic_sampling or invert_sigmas:
            raise ValueError(
                f"FlowMatchSDEScheduler got stochastic_sampling={stochastic_sampling} and invert_sigmas={invert_sigmas}: the first "
                "samples another distribution than the model's, the second runs from data to noise. Set both to False."
            )
        self.level = MEMORYLESS[kernel] if noise_level is None else float(noise_level)
        self._host_sigmas: tuple[float, ...] = tuple(self.sigmas.tolist())

    @property
    def memoryless(self) -> bool:
        """Whether x_0 does not depend on x_T: the level is that high, and the window, if any, begins at the first step."""
        start = self.config.window[0] if self.config.window else 0
        return self.level >= MEMORYLESS[self.config.kernel] * (1 - 1e-6) and start == 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As in the stock scheduler, except for the sigmas where neither they nor timesteps are given."""
        if self.level and num_inference_steps is not None and sigmas is None and timesteps is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self._host_sigmas = tuple(self.sigmas.tolist())  # once: read on a device, every step would wait for it

    def ode_step(self, timestep: float | int | Tensor | None) -> bool:
        """Whether `window` leaves the coming step, at this timestep, to the ODE; None asks of the schedule's first step."""
        if not self.config.window:
            return False
        start, stop = self.config.window
        return not start <= (0 if timestep is None else self._coming(timestep)) < stop

    def step(
        self,
        model_output: Tensor,
        timestep: float | int | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """x_s from x_t; the arguments of the stock `step`, and `variance_noise`, z instead of a draw.

        Raises:
            ValueError: the timestep is an integer, or tokens have timesteps of their own in a step with noise.
        """
        i = self._coming(timestep)
        t, s = self._host_sigmas[i], self._host_sigmas[i + 1]
        if s == 0 or self.level == 0 or self.ode_step(timestep):
            # The stock step: it finds the same index.
            return super().step(
                model_output, timestep, sample, per_token_timesteps=per_token_timesteps, return_dict=return_dict
            )
        if per_token_timesteps is not None:
            raise ValueError("FlowMatchSDEScheduler has one timestep per step: call it without per_token_timesteps.")
        kept, moved, std = self.transition(t, s)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        z = variance_noise
        if z is None:
            z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x_s = (kept * x + moved * model_output.to(x) + std * z.to(x)).to(model_output.dtype)
        self._step_index = i + 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def transition(self, t: float, s: float) -> tuple[float, float, float]:
        """kept, moved and std of x_s = kept·x_t + moved·u + std·z, for 0 < s < t <= 1."""
        data = max(0.0, 1 - t)  # float32 schedules may begin a digit above 1
        if self.config.kernel == "posterior":
            std = self.level * s * math.sqrt(max(0.0, 1 - (data * s / ((1 - s) * t)) ** 2))
            noise = math.sqrt(max(0.0, s * s - std * std))
            return 1 - s + noise, noise * data - (1 - s) * t, std
        variance = self.level**2 * t / max(data, t - s)  # sigma²; finite where the SDE begins, and no step overshoots
        pull = variance / (2 * t)
        return 1 + pull * (s - t), (1 + pull * data) * (s - t), math.sqrt(variance * (t - s))

    def _coming(self, timestep: float | int | Tensor) -> int:
        """Index of the coming step, found at the first one as the stock scheduler finds it."""
        whole = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
        if whole:
            raise ValueError(
                f"FlowMatchSDEScheduler got timestep {timestep}: give one of scheduler.timesteps, no index."
            )
        known = self.begin_index if self.step_index is None else self.step_index
        index: int = self.index_for_timestep(timestep) if known is None else known
        return index


def check_settings(kernel: Any, noise_level: Any, window: Any) -> None:
    """Refuse settings that are no sampler.

    Raises:
        ValueError: an unknown kernel, a level out of range, or a window that is no stretch of steps.
    """
    if kernel not in MEMORYLESS:
        raise ValueError(f"kernel={kernel!r} must be one of {', '.join(map(repr, MEMORYLESS))}.")
    most = LARGEST[kernel]
    if noise_level is not None and not 0 <= noise_level <= most:
        raise ValueError(
            f"noise_level={noise_level} is outside [0, {most:g}], the range of the {kernel} kernel; leave it out for "
            f"{MEMORYLESS[kernel]:.5g}, the level without memory."
        )
    if window is None:
        return
    stretch = isinstance(window, Sequence) and len(window) == 2 and all(type(bound) is int for bound in window)
    if not stretch or not 0 <= window[0] < window[1]:
        raise ValueError(
            f"window={window!r} must be [start, stop] with 0 <= start < stop: the steps start, …, stop - 1 draw noise."
        )
