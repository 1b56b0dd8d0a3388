"""Choose a diffusers scheduler by name and make sure, before weights are loaded, that sampling with it is stochastic."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

__all__ = ["build_scheduler", "check_eta", "check_sampler", "own_settings", "scheduler_class", "takes_eta"]

REMEDY = (
    "Choose DDIMScheduler (with eta 1.0), DDPMScheduler, EulerAncestralDiscreteScheduler, or DPMSolverMultistepScheduler with "
    "scheduler_arguments {algorithm_type: sde-dpmsolver++}."
)


def scheduler_class(name: str) -> type:
    """The diffusers scheduler of that class name.

    Raises:
        ValueError: diffusers has no such scheduler; the message names the nearest ones.
    """
    import diffusers

    names = [known for known in dir(diffusers) if known.endswith("Scheduler")]
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see diffusers.schedulers for the names."
        raise ValueError(f"scheduler={name!r} is not a scheduler of diffusers: {hint}")
    found: type = getattr(diffusers, name)
    return found


def build_scheduler(config: Mapping[str, Any], name: str | None, arguments: Mapping[str, Any]) -> Any:
    """The scheduler `name` with the pipeline's own noise schedule, except for `arguments`.

    Args:
        config: The pipeline's scheduler config: betas, prediction type, spacing, offset.
        name: Class name in diffusers; None is DDIM.
        arguments: Constructor arguments that differ from `config`.

    Raises:
        ValueError: no such scheduler, or it has no such argument.
    """
    cls: Any = scheduler_class(name or "DDIMScheduler")
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key in arguments:
        if key not in known:
            near = get_close_matches(key, known, n=1) or known
            raise ValueError(f"{cls.__name__} has no argument {key!r}; did you mean {' or '.join(near)}?")
    # What stock Stable Diffusion pipelines insist on; older configs lack both, and clipping latents ruins them.
    latent = {key: value for key, value in {"clip_sample": False, "steps_offset": 1}.items() if key in known}
    return cls.from_config(dict(config), **(latent | dict(arguments)))


def takes_eta(scheduler: Any) -> bool:
    """True where `step` has the DDIM noise level eta as an argument."""
    return "eta" in inspect.signature(scheduler.step).parameters


def own_settings(scheduler: Any) -> dict[str, Any]:
    """The scheduler's arguments that are not its class's defaults, as JSON values.

    Without the defaults, a diffusers version that adds an argument leaves a stored fingerprint valid.
    """
    parameters = inspect.signature(type(scheduler).__init__).parameters
    settings = json.loads(scheduler.to_json_string())
    return {key: value for key, value in settings.items() if key in parameters and value != parameters[key].default}


def check_eta(eta: float) -> None:
    """Refuse noise levels without a density.

    Raises:
        ValueError: eta is not in (0, 1].
    """
    if eta == 0:
        raise ValueError(
            "eta=0 makes DDIM deterministic: its transitions have no density, so neither log_q nor log_p exists. Set eta=1.0."
        )
    if not 0 < eta <= 1:
        raise ValueError(f"eta={eta} is outside (0, 1]: set eta=1.0, the noise of the DDPM posterior.")


def check_sampler(scheduler: Any, steps: int, eta: float, timesteps: Sequence[int] | None = None) -> None:
    """Take the first step of a tiny chain with two seeds: a stochastic sampler answers differently.

    Raises:
        ValueError: it answers the same, so its transitions have no density; `eta` is set and it has none; it takes no
            `timesteps`, or they are not falling and inside its schedule.
    """
    name = type(scheduler).__name__
    if timesteps is not None:
        _check_timesteps(scheduler, [int(t) for t in timesteps])
    if not takes_eta(scheduler) and eta != 1:
        raise ValueError(f"eta={eta}, but {name} has no eta: leave eta out, or set scheduler: DDIMScheduler.")
    first, second = (_first_step(scheduler, steps, timesteps, eta, seed) for seed in (0, 1))
    if torch.equal(first, second):
        raise ValueError(f"{name} draws no noise as it is configured, so its transitions have no density. {REMEDY}")
    if takes_eta(scheduler) and eta < 1:
        warnings.warn(
            f"eta={eta} < 1 is not memoryless: x_0 depends on x_T, so log Z differs between trajectories of one prompt and "
            "the posterior will be biased. Set eta=1.0.",
            stacklevel=2,
        )


def _check_timesteps(scheduler: Any, timesteps: list[int]) -> None:
    name, last = type(scheduler).__name__, int(scheduler.config.num_train_timesteps) - 1
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name} takes no timesteps of one's own: give steps, or set scheduler: DDPMScheduler.")
    falling = all(s < t for t, s in itertools.pairwise(timesteps))
    if not falling or timesteps[0] > last or timesteps[-1] < 0:
        raise ValueError(f"timesteps={timesteps} must fall from at most {last} to at least 0.")


def _first_step(scheduler: Any, steps: int, timesteps: Sequence[int] | None, eta: float, seed: int) -> torch.Tensor:
    scheduler = copy.deepcopy(scheduler)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=[int(t) for t in timesteps])
    t, x = scheduler.timesteps[0], torch.zeros(1, 1, 2, 2)
    parameters = inspect.signature(scheduler.step).parameters
    call: dict[str, Any] = {"eta": eta} if "eta" in parameters else {}
    if "generator" in parameters:
        call["generator"] = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # some schedulers draw from the global generator
        torch.manual_seed(seed)
        moved: torch.Tensor = scheduler.step(torch.zeros_like(x), t, scheduler.scale_model_input(x, t), **call)[0]
    return moved
