"""Does the chain of a prior fit the objective and the behaviours of a run? Asked as early as the prior knows its sampler.

Each check raises a ValueError that says what does not fit, and what to use instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusion_rtb.abilities import ChecksSteps, KnowsNoise, KnowsSampler, ObjectiveTraits
from diffusion_rtb.chain.forward_process import network_predicts
from diffusion_rtb.chain.recordable import check_single_step, solver_order, steps_of
from diffusion_rtb.chain.reversal import Reversal
from diffusion_rtb.config.sections import RunConfig
from diffusion_rtb.interfaces import AimsStates, Objective, Prior, ReadsAdjoint, RefinesValue
from diffusion_rtb.needs import instead

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture
    from diffusion_rtb.run.checks import Components

__all__ = [
    "check_chain",
    "check_configured_steps",
    "check_noise",
    "check_sampler",
    "check_step_weights",
    "check_steps",
    "why_no_noise",
]


def check_sampler(config: RunConfig, components: Components, mixture: Mixture) -> None:
    """Refuse, where a prior knows its scheduler before its weights load, one without what training or a behaviour needs of it."""
    prior, objective = components.prior.ahead(), components.objective.construct()
    sampler = prior.known_sampler if isinstance(prior, KnowsSampler) else None
    if sampler is None:
        return
    check_noise(config, prior, objective, mixture)
    _check_scheduler(sampler, objective, noise=not why_no_noise(prior))
    if any(source.judges_estimates for source in mixture.drawing):
        network_predicts(sampler, "behaviour")


def check_chain(config: RunConfig, objective: Objective, prior: Prior, mixture: Mixture) -> None:
    """The checks of a loaded prior's scheduler and steps."""
    check_noise(config, prior, objective, mixture)
    _check_scheduler(prior.pipe.scheduler, objective, noise=not why_no_noise(prior))
    arguments = prior.arguments(config.prompts.texts()[:1])
    check_steps(objective, arguments)
    check_step_weights(config, arguments)


def why_no_noise(prior: object) -> str:
    """What a prior says of a sampler without noise; empty: it has some, or nobody knows."""
    return (prior.why_no_noise or "") if isinstance(prior, KnowsNoise) else ""


def check_noise(config: RunConfig, prior: object, objective: Objective, mixture: Mixture) -> None:
    """Refuse what reads the density of steps, or their noise, where the prior says that they have none."""
    why = why_no_noise(prior)
    if not why:
        return
    if not _takes_any_sampler(objective):
        reads = "is led along steps with noise" if isinstance(objective, AimsStates) else "reads log-densities of steps"
        raise ValueError(f"objective {config.objective.component} {reads}. {why} {instead('noise', 'objective')}")
    if isinstance(objective, RefinesValue) and objective.warm_up_rounds > 0:
        raise ValueError(f"objective.rounds: V leads the prior in steps with noise. {why} Or set rounds to 0.")
    for source in mixture.drawing:
        if source.needs_noise:
            own = "on_policy with exploration" if source is mixture.on_policy else type(source).__name__
            raise ValueError(f"behaviour {own} needs steps with noise. {why} {instead('noise', 'behaviour')}")
    for name, what in (("beta.kl_budget", config.beta.kl_budget), ("watch", config.watch)):
        if what is not None:
            raise ValueError(f"{name} measures the KL, from log-densities of steps. {why} Or set {name} to null.")


def _takes_any_sampler(objective: Objective) -> bool:
    """It asks a sampler for its levels alone: an objective of states, but those that are led along the recorded steps."""
    return isinstance(objective, AimsStates) and not isinstance(objective, ReadsAdjoint)


def _check_scheduler(sampler: Any, objective: Objective, *, noise: bool) -> None:
    aims, traits = _takes_any_sampler(objective), ObjectiveTraits.of(objective)
    if not aims:
        check_single_step(sampler)
    reversed_steps = aims and (not noise or solver_order(sampler) > 1)
    if reversed_steps or traits.noises or traits.learns_samples or traits.estimates_every:
        network_predicts(sampler, "objective")
    if reversed_steps:
        Reversal.check(sampler)


def check_steps(objective: Objective, arguments: dict[str, Any]) -> None:
    """Let an objective with a `check_steps` (Trust-PCL's length divides them) see the steps, where a pipeline's call says them."""
    steps = steps_of(arguments)
    if isinstance(objective, ChecksSteps) and steps is not None:
        objective.check_steps(steps)


def check_step_weights(config: RunConfig, arguments: dict[str, Any]) -> None:
    """Refuse train.step_weights that are not one per step, where a pipeline's call says how many there are."""
    weights, steps = config.train.step_weights, steps_of(arguments)
    if weights is not None and steps is not None and len(weights) != steps:
        raise ValueError(
            f"train.step_weights has {len(weights)} entries, the prior takes {steps} steps: give one for each, or null."
        )


def check_configured_steps(config: RunConfig, objective: Objective) -> None:
    """`check_steps` and `check_step_weights` with the steps that the config states for its prior, before that is loaded."""
    stated = (config.prior.model_extra or {}).get
    timesteps, steps = stated("timesteps"), stated("steps")
    arguments = {
        "timesteps": timesteps if isinstance(timesteps, list) else None,
        "num_inference_steps": steps if isinstance(steps, int) else None,
    }
    check_steps(objective, arguments)
    check_step_weights(config, arguments)
