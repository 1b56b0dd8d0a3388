"""Sampling loops of one's own around stock schedulers, with a network of one number: quick enough to try every scheduler."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusion_rtb import schedulers
from diffusion_rtb.chain.trajectory import Trajectory

DIMS = (4, 16, 16)
BATCH = 3
SDE = {"algorithm_type": "sde-dpmsolver++"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, **LATENT}, {"eta": 1.0}),
    "ddim_half_eta": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False, **LATENT}, {"eta": 0.5}),
    "ddim_parallel": ("DDIMParallelScheduler", {}, {"eta": 1.0}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large", "thresholding": True}, {}),
    "ddpm_parallel": ("DDPMParallelScheduler", {}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", LATENT, {}),
    "euler_churn": ("EulerDiscreteScheduler", LATENT, {"s_churn": 3.0, "s_noise": 1.01}),
    "edm_euler_churn": ("EDMEulerScheduler", {}, {"s_churn": 3.0}),
    "sde_dpm_1": ("DPMSolverMultistepScheduler", {"solver_order": 1, **SDE, **LATENT}, {}),
    "sde_dpm_1_plain": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "sde_dpm_2": ("DPMSolverMultistepScheduler", {**SDE, **LATENT}, {}),
    "sde_dpm_3": ("DPMSolverMultistepScheduler", {"solver_order": 3, **SDE, **LATENT}, {}),
    "sde_dpm_flow": ("DPMSolverMultistepScheduler", {"solver_order": 1, **SDE, **FLOW}, {}),
    "singlestep_1": ("DPMSolverSinglestepScheduler", {"solver_order": 1, **SDE}, {}),
    "singlestep_2": ("DPMSolverSinglestepScheduler", {"solver_order": 2, **SDE}, {}),
    "edm_dpm_2": ("EDMDPMSolverMultistepScheduler", SDE, {}),
    "lcm": ("LCMScheduler", LATENT, {}),
    "tcd": ("TCDScheduler", LATENT, {"eta": 1.0}),
    "unclip": ("UnCLIPScheduler", {}, {}),
    "consistency": ("CMStochasticIterativeScheduler", {}, {}),
    "flow_match": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    "flow_match_sde": ("FlowMatchSDEScheduler", {"shift": 3.0}, {}),
    "flow_match_posterior": ("FlowMatchSDEScheduler", {"kernel": "posterior"}, {}),
    "flow_match_window": ("FlowMatchSDEScheduler", {"window": [2, 4]}, {}),
    "flow_match_lcm": ("FlowMatchLCMScheduler", {}, {}),
    "ltx": ("LTXEulerAncestralRFScheduler", {}, {}),
    "wuerstchen": ("DDPMWuerstchenScheduler", {}, {}),
}
"""Scheduler class, its arguments, and those of its `step`."""

MULTISTEP = ("sde_dpm_2", "sde_dpm_3", "singlestep_2", "edm_dpm_2")


def sampler(name: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    kind, settings, options = SAMPLERS[name]
    return getattr(schedulers if kind in schedulers.__all__ else diffusers, kind)(**settings | arguments), options


class Net(nn.Module):
    """A bounded function of the state, so that chains of every kind stay finite."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * x) * 0.9


class Loop:
    """What replay asks for: `scheduler`, and a class with `__call__`."""

    def __init__(self, scheduler: Any, dtype: torch.dtype = torch.float32) -> None:
        self.scheduler = scheduler
        self.net = Net(dtype)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int,
        generator: list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        begin: int | None = None,
        **options: Any,
    ) -> Tensor:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        if begin is not None:
            scheduler.set_begin_index(begin)
        x = self.first(generator) if latents is None else latents
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        taken = inspect.signature(scheduler.step).parameters
        given = options | ({"generator": generator} if generator is not None and "generator" in taken else {})
        times = (
            scheduler.timesteps if type(scheduler).__name__ != "DDPMWuerstchenScheduler" else scheduler.timesteps[:-1]
        )
        for t in times[begin or 0 :]:
            if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
                t = t.expand(len(x))
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(self.net(seen), t, x, **given, return_dict=False)[0]
        return x

    def first(self, generator: list[torch.Generator] | None) -> Tensor:
        rows = generator or [torch.Generator().manual_seed(k) for k in range(BATCH)]
        return torch.cat([torch.randn(1, *DIMS, generator=g, dtype=self.dtype) for g in rows])


def generators(count: int = BATCH, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def squared_innovations(trajectory: Trajectory) -> list[float]:
    """E[((x_s - mean)/std)²] of each step with a density, read back from its log-density."""
    dims = math.prod(trajectory.dims)
    found = []
    for i in trajectory.stochastic.nonzero().flatten().tolist():
        constant = math.log(float(trajectory.std[i])) + 0.5 * math.log(2 * math.pi)
        found.append(float((-2 * (trajectory.log_prob[:, i].double() / dims + constant)).mean()))
    return found
