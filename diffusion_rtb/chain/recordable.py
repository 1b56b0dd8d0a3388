"""Which schedulers have a density, which do not, and what to use instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "ROLES",
    "STOCHASTIC",
    "DeterministicStepError",
    "HasODESteps",
    "check_recordable",
    "check_single_step",
    "is_ode_step",
    "refuse_deterministic",
    "samples_flows",
    "solver_order",
    "steps_of",
]

ROLES = ("model_output", "timestep", "sample")

STOCHASTIC = (
    "DDIMScheduler with eta=1.0, DDPMScheduler, EulerAncestralDiscreteScheduler, or DPMSolverMultistepScheduler with "
    "algorithm_type='sde-dpmsolver++' and solver_order=1; for flows diffusion_rtb.schedulers.FlowMatchSDEScheduler"
)

FORWARD = "use DDIMScheduler and pass eta=1.0 to the pipeline: this one runs from pictures to noise"
NONE_FITS = "take another pipeline: no stochastic scheduler fits its network"

REMEDIES = {
    "DDIMScheduler": "pass eta=1.0 to the pipeline",
    "TCDScheduler": "pass eta=1.0 to the pipeline",
    "DPMSolverMultistepScheduler": 'build it with algorithm_type="sde-dpmsolver++" and solver_order=1',
    "EulerDiscreteScheduler": "use EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)",
    "KDPM2DiscreteScheduler": "use EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)",
    "DDIMInverseScheduler": FORWARD,
    "DPMSolverMultistepInverseScheduler": FORWARD,
    "FlowMapEulerDiscreteScheduler": NONE_FITS,
    "MiniMaxH3Scheduler": NONE_FITS,
}
DEFAULT_REMEDY = "use DDIMScheduler.from_config(pipe.scheduler.config) and pass eta=1.0 to the pipeline"
FLOW_REMEDY = "use diffusion_rtb.schedulers.FlowMatchSDEScheduler.from_config(pipe.scheduler.config)"


def check_recordable(scheduler: Any) -> None:
    """Refuse schedulers whose `step` is no transition of one state.

    Raises:
        ValueError: `step` needs more than the network's output, the timestep and the state; or it keeps the noise of earlier
            steps, so that a state is no Gaussian given the one before it.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise ValueError(f"{name} has no method `step`, so there is nothing to record. Use {STOCHASTIC}.")
    parameters = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    needed = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > len(ROLES):
        raise ValueError(
            f"{name}.step needs {', '.join(needed)}: more than {', '.join(ROLES)}, so x_s does not follow from x_t and the "
            f"network alone. Use {STOCHASTIC}."
        )
    if own_setting(scheduler, "predictor_order") is not None:
        raise ValueError(
            f"{name} corrects each state with the noise of the step before, so x_s is no Gaussian given x_t. Use {STOCHASTIC}."
        )


def solver_order(scheduler: Any) -> int:
    """How many network outputs one step combines, as its config says; 1 where it does not."""
    return int(own_setting(scheduler, "solver_order") or 1)


def steps_of(arguments: Mapping[str, Any]) -> int | None:
    """Denoising steps of a pipeline's call; None where it does not say."""
    timesteps, steps = arguments.get("timesteps"), arguments.get("num_inference_steps")
    return len(timesteps) if timesteps is not None else None if steps is None else int(steps)


def own_setting(scheduler: Any, name: str) -> Any:
    """A setting that the scheduler has; what `from_config` keeps of another scheduler's means nothing to it."""
    config = getattr(scheduler, "config", None)
    kept = getattr(config, name, None)
    known = inspect.signature(type(scheduler).__init__).parameters
    return kept if name in known or not hasattr(type(scheduler), "from_config") else None


@runtime_checkable
class HasODESteps(Protocol):
    """A scheduler that leaves some of its steps to the ODE on purpose, and says which: any place in the chain may be one."""

    def ode_step(self, timestep: Any) -> bool:
        """Whether the coming step, at this timestep, is one of them; None asks of the schedule's first, before it is made."""


def is_ode_step(scheduler: Any, timestep: Any) -> bool:
    """Whether the scheduler leaves the coming step to the ODE; only it knows that a step is without noise on purpose."""
    return isinstance(scheduler, HasODESteps) and scheduler.ode_step(timestep)


def samples_flows(scheduler: Any) -> bool:
    """Whether it takes the network's output for the velocity of a flow, by its config and its name."""
    settings, name = getattr(scheduler, "config", {}), type(scheduler).__name__
    return (
        "FlowMatch" in name
        or name.endswith("RFScheduler")
        or "flow" in str(settings.get("prediction_type"))
        or bool(settings.get("use_flow_sigmas"))
    )


def check_single_step(scheduler: Any) -> None:
    """Refuse solvers whose gradient cannot be taken step by step.

    Raises:
        ValueError: it is multistep: a mean depends on earlier network outputs, whose graphs are gone.
    """
    order = solver_order(scheduler)
    if order > 1:
        raise ValueError(
            f"{type(scheduler).__name__} with solver_order={order} combines several network outputs in one step, so its gradient "
            "cannot be taken step by step. Build it with solver_order=1 (scheduler_arguments: {solver_order: 1} in a config)."
        )


class DeterministicStepError(ValueError):
    """A step without noise, where there has to be some; `begun`: not at the first step."""

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun


def refuse_deterministic(scheduler: Any, timestep: float, *, begun: bool = False) -> None:
    """Raise the error for a step without a density, naming what makes this scheduler stochastic.

    Args:
        scheduler: Which makes the step.
        timestep: At which it makes it.
        begun: Steps with noise came before it, and another step comes after it.
    """
    name = type(scheduler).__name__
    remedy = (
        f"To make it stochastic, {REMEDIES.get(name, FLOW_REMEDY if samples_flows(scheduler) else DEFAULT_REMEDY)}."
    )
    if begun:
        remedy = (
            "Only a last step may be one: the schedule has two equal noise levels, or the loop goes on after its end. Choose "
            "another number of steps, or other sigmas."
        )
    raise DeterministicStepError(
        f"{name} makes a deterministic step at timestep {timestep:g} (std 0), so log p(x_s | x_t) does not exist. {remedy}",
        begun=begun,
    )
