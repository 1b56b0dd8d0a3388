"""Choose a diffusers scheduler by name and find out, before weights are loaded, whether it can be recorded and draws noise."""

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

from diffusion_rtb.chain.recordable import DeterministicStepError, samples_flows
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.component_errors import nearest

__all__ = ["build_scheduler", "check_eta", "check_sampler", "own_settings", "scheduler_class", "takes_eta"]

REMEDY = (
    "Choose DDIMScheduler (with eta 1.0), DDPMScheduler, EulerAncestralDiscreteScheduler, or DPMSolverMultistepScheduler with "
    "scheduler_arguments {algorithm_type: sde-dpmsolver++, solver_order: 1}."
)
FLOW_REMEDY = (
    "Choose FlowMatchSDEScheduler, or DPMSolverMultistepScheduler with scheduler_arguments {algorithm_type: sde-dpmsolver++, "
    "solver_order: 1, use_flow_sigmas: true, prediction_type: flow_prediction}."
)


def scheduler_class(name: str) -> type:
    """The scheduler of that class name, of diffusers or of `diffusion_rtb.schedulers`.

    Raises:
        ValueError: there is no such scheduler; the message names the nearest ones.
    """
    import diffusers

    from diffusion_rtb import schedulers

    homes = {known: diffusers for known in dir(diffusers) if known.endswith("Scheduler")}
    homes |= dict.fromkeys(schedulers.__all__, schedulers)
    if name not in homes:
        near = get_close_matches(name, homes, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see diffusers.schedulers for the names."
        raise ValueError(f"scheduler={name!r} is not a scheduler of diffusers: {hint}")
    found: type = getattr(homes[name], name)
    return found


def build_scheduler(
    config: Mapping[str, Any],
    name: str,
    arguments: Mapping[str, Any],
    *,
    always: Mapping[str, Any] | None = None,
    predicts: str = "epsilon",
) -> Any:
    """The scheduler `name` with the pipeline's own noise schedule, except for `arguments`.

    Args:
        config: The pipeline's scheduler config: betas, prediction type, spacing, offset.
        name: Class name in diffusers, or in `diffusion_rtb.schedulers`.
        arguments: Constructor arguments that differ from `config`.
        always: Others that hold whatever `config` says, where the scheduler has them.
        predicts: What the pipeline's network predicts where `config` does not say so.

    Raises:
        ValueError: no such scheduler, it has no such argument, it samples flows and the pipeline's network predicts something
            else, it samples another distribution than the model's, or it needs a package that is not installed.
    """
    cls: Any = scheduler_class(name)
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key in arguments:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no argument {key!r}.{nearest(key, known)} It has {', '.join(known)}.")
    fixed = _same_shift(config, known) | {key: value for key, value in (always or {}).items() if key in known}
    try:
        built = cls.from_config(dict(config), **(fixed | dict(arguments)))
    except ImportError as error:
        raise ValueError(
            f"{cls.__name__} needs a package that is not installed ({_sentence(error)}). Install it, or: {REMEDY}"
        ) from error
    except TypeError as error:
        raise ValueError(f"{cls.__name__} is made for other networks ({_sentence(error)}). {REMEDY}") from error
    _check_prediction(built, config.get("prediction_type", predicts))
    _check_distribution(built)
    return built


def _same_shift(config: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """A flow's shift under the name that the scheduler has for it: Euler's `shift` is the multistep solvers' `flow_shift`."""
    for own, other in (("shift", "flow_shift"), ("flow_shift", "shift")):
        if own in known and own not in config and other in config:
            return {own: config[other]}
    return {}


def _check_distribution(scheduler: Any) -> None:
    """Refuse schedulers that draw x_s around x̂ alone: exact chains of another distribution than the model's."""
    name = type(scheduler).__name__
    if scheduler.config.get("stochastic_sampling") or name == "FlowMatchLCMScheduler":
        option = "" if name == "FlowMatchLCMScheduler" else " with stochastic_sampling"
        raise ValueError(
            f"{name}{option} samples another distribution than the model's: it takes the estimate of x_0 for x_0 and noises it "
            "anew, which halves the variance of Gaussian data however many steps it makes. Set scheduler: FlowMatchSDEScheduler "
            "and leave stochastic_sampling out."
        )


def _check_prediction(scheduler: Any, predicted: str) -> None:
    """Refuse schedulers that would take what the network predicts, noise, v or a flow's velocity, for something else."""
    name, flow = type(scheduler).__name__, samples_flows(scheduler)
    if "flow" in predicted and not flow:
        raise ValueError(
            f"{name} as it is configured samples from noise or v, and this pipeline's network predicts the velocity of a flow. "
            f"{FLOW_REMEDY}"
        )
    if flow and "flow" not in predicted:
        raise ValueError(
            f"{name} as it is configured samples flows, whose networks predict a velocity; this pipeline's network predicts "
            f"{predicted!r}, so its samples would be noise. {REMEDY}"
        )
    if flow:
        return
    missing = [part for part in ("step", "scale_model_input", "init_noise_sigma") if not hasattr(scheduler, part)]
    if missing or "prediction_type" not in inspect.signature(type(scheduler).__init__).parameters:
        lacks = f"it has no {missing[0]}" if missing else "it has no prediction_type"
        raise ValueError(f"{name} is made for other networks than one that predicts {predicted!r}: {lacks}. {REMEDY}")


def _sentence(error: Exception) -> str:
    """The first line of an error's text."""
    return " ".join(str(error).split()).split(". ")[0].strip() or type(error).__name__


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
    """Refuse noise levels that DDIM does not have.

    Raises:
        ValueError: eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta={eta} is outside [0, 1]: set eta=1.0, the noise of the DDPM posterior, or 0, no noise, for objectives that learn "
            "from noised samples."
        )


def check_sampler(scheduler: Any, steps: int, eta: float, timesteps: Sequence[int] | None = None) -> str:
    """Record a chain of the scheduler in miniature, so that what the recorder would refuse is refused before weights load.

    Returns:
        Why its transitions have no density, and how they get one; empty: they have one.

    Raises:
        ValueError: it cannot be recorded; `eta` is set and it has none; the steps leave its schedule; it takes no `timesteps`, or
            they are not falling and inside its schedule.
    """
    name, remedy = type(scheduler).__name__, FLOW_REMEDY if samples_flows(scheduler) else REMEDY
    if timesteps is not None:
        _check_timesteps(scheduler, [int(t) for t in timesteps])
    if not takes_eta(scheduler) and eta != 1:
        other = (
            "set scheduler_arguments: {noise_level: …}"
            if hasattr(scheduler, "memoryless")
            else "set scheduler: DDIMScheduler"
        )
        raise ValueError(f"eta={eta}, but {name} has no eta: leave eta out, or {other}.")
    _check_window(scheduler, steps)
    variance = scheduler.config.get("variance_type") or ""
    if variance.startswith("learned"):
        raise ValueError(
            f"{name} has variance_type {variance!r}: the network predicts its variance, which differs in each dimension. Set "
            "scheduler_arguments {variance_type: fixed_small}."
        )
    trial = copy.deepcopy(scheduler)
    _set(trial, steps, timesteps)
    try:
        noisy = _draws_noise(trial, eta, remedy)
    except Exception as error:
        if isinstance(error, ValueError):
            raise  # the recorder's own: it has the reason and the remedy
        raise ValueError(f"{name} cannot make the steps of this pipeline ({_named(error)}). {remedy}") from error
    if noisy:
        _warn_of_memory(scheduler, eta)
        return ""
    if takes_eta(scheduler) and eta == 0:
        return "eta=0 makes DDIM deterministic: its transitions have no density, so neither log_q nor log_p exists. Set eta=1.0."
    return f"{name} draws no noise as it is configured, so its transitions have no density. {remedy}"


def _check_window(scheduler: Any, steps: int) -> None:
    """Refuse a stretch of steps with noise that the schedule does not have; its last step draws none in any case."""
    window = scheduler.config.get("window")
    if window and not (window[1] <= steps and window[0] < steps - 1):
        raise ValueError(
            f"window={list(window)} does not fit {steps} steps, the last of which draws no noise: set [start, stop] with "
            f"start < {steps - 1} and stop <= {steps}."
        )


def _warn_of_memory(scheduler: Any, eta: float) -> None:
    """Where x_0 depends on the state that the noise starts from, one log Z per prompt does not fit."""
    settings = scheduler.config
    own = eta if takes_eta(scheduler) else settings.get("eta", 1.0)
    start = (settings.get("window") or [0])[0]
    if own < 1:
        cause, remedy = f"eta={own} < 1 is not memoryless: x_0 depends on x_T", "Set eta=1.0."
    elif start:
        cause = f"window={list(settings.window)} starts from states that the ODE made of x_T, and x_0 depends on them"
        remedy = "Set a window that begins at 0, or use trust_pcl with a length: its value network is a log Z for each state."
    elif not getattr(scheduler, "memoryless", True):
        cause = (
            f"noise_level={settings.noise_level} of the {settings.kernel} kernel is not memoryless: x_0 depends on x_T"
        )
        remedy = "Leave noise_level out."
    else:
        return
    warnings.warn(
        f"{cause}, so log Z differs between trajectories of one prompt and the posterior will be biased. {remedy}",
        stacklevel=3,
    )


def _check_timesteps(scheduler: Any, timesteps: list[int]) -> None:
    name, last = type(scheduler).__name__, int(scheduler.config.num_train_timesteps) - 1
    if samples_flows(scheduler):
        raise ValueError(
            f"timesteps={timesteps}: a flow's scheduler shifts its noise levels, but not timesteps. Give steps."
        )
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name} takes no timesteps of one's own: give steps, or set scheduler: DDPMScheduler.")
    falling = all(s < t for t, s in itertools.pairwise(timesteps))
    if not falling or timesteps[0] > last or timesteps[-1] < 0:
        raise ValueError(f"timesteps={timesteps} must fall from at most {last} to at least 0.")


def _set(scheduler: Any, steps: int, timesteps: Sequence[int] | None) -> None:
    """Set the timesteps, and refuse those outside the noise schedule, where schedulers fail or silently stay."""
    count = len(scheduler.alphas_cumprod) if hasattr(scheduler, "alphas_cumprod") else None
    offset, spacing = int(scheduler.config.get("steps_offset") or 0), scheduler.config.get("timestep_spacing")
    outside = count is not None and steps > count
    if not outside:
        try:
            if timesteps is None:
                scheduler.set_timesteps(steps, **_shifting(scheduler))
            else:
                scheduler.set_timesteps(timesteps=[int(t) for t in timesteps])
        except Exception as error:
            raise ValueError(
                f"{type(scheduler).__name__} cannot make {steps} steps ({_named(error)}). "
                f"{FLOW_REMEDY if samples_flows(scheduler) else REMEDY}"
            ) from error
        outside = count is not None and float(scheduler.timesteps[0]) > count - 1
    if outside and count is not None:
        raise ValueError(
            f"steps={steps} with timestep_spacing {spacing!r} and steps_offset {offset} leaves the noise schedule, which has "
            f"timesteps 0 to {count - 1}: set steps to at most {count - offset}."
        )


def _shifting(scheduler: Any) -> dict[str, float]:
    """The shift mu of the largest size, where pipelines compute one from the size: of all it leaves most noise."""
    dynamic = scheduler.config.get("use_dynamic_shifting")
    return {"mu": float(scheduler.config.get("max_shift") or 1.15)} if dynamic else {}


def _draws_noise(scheduler: Any, eta: float, remedy: str) -> bool:
    """Record all steps of a chain; whether they have noise, all but those that may be without; ValueError: some others have."""
    try:
        _record(copy.deepcopy(scheduler), eta, needs_noise=True)
    except DeterministicStepError as error:
        if error.begun:
            raise
        if _record(scheduler, eta, needs_noise=False).has_density:
            name = type(scheduler).__name__
            raise ValueError(f"{name} draws noise in some of its steps only, the first has none. {remedy}") from error
        return False
    return True


def _record(scheduler: Any, eta: float, *, needs_noise: bool) -> Trajectory:
    """A chain of four numbers under a recorder."""
    generator = torch.Generator().manual_seed(0)
    call = {"eta": eta} if takes_eta(scheduler) else {}
    x = torch.randn(1, 1, 2, 2, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flows have neither
    recorder = TrajectoryRecorder(scheduler, needs_noise=needs_noise)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder:
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * scaled(x, t), t, x, **call, return_dict=False)[0]
    return recorder.trajectory


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_sentence(error)}"
