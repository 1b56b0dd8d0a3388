"""Fine-tune diffusion models towards the posterior p(x)·exp(beta·r(x)) / Z by relative trajectory balance.

with TrajectoryRecorder(pipe.scheduler) as recorder:      # any stock diffusers pipeline
    images = pipe("a cat emoji", eta=1.0).images
trajectory = recorder.trajectory                          # states and log-densities of all steps
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_rtb.chain.recorder import TrajectoryRecorder
    from diffusion_rtb.chain.rollout import replay, replay_backward
    from diffusion_rtb.chain.seeds import trajectory_noise
    from diffusion_rtb.chain.trajectory import Trajectory
    from diffusion_rtb.config.load import RunConfig, load_config
    from diffusion_rtb.interfaces import Loss, Objective, Prior, Reward, Terms

__version__ = "0.1.0"

__all__ = [
    "Loss",
    "Objective",
    "Prior",
    "Reward",
    "RunConfig",
    "Terms",
    "Trajectory",
    "TrajectoryRecorder",
    "load_config",
    "replay",
    "replay_backward",
    "trajectory_noise",
]

_MODULES = {
    "config.load": ("load_config",),
    "config.sections": ("RunConfig",),
    "interfaces": ("Loss", "Objective", "Prior", "Reward", "Terms"),
    "chain.recorder": ("TrajectoryRecorder",),
    "chain.rollout": ("replay", "replay_backward"),
    "chain.seeds": ("trajectory_noise",),
    "chain.trajectory": ("Trajectory",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package costs nothing."""
    for module, names in _MODULES.items():
        if name in names:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
