"""Does an objective fit the behaviours and the processes of a run? What does not is refused before anything is drawn.

Each check raises a ValueError that says what does not fit, and what to use instead. What a chain has to be: `chain_checks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_rtb.abilities import ChecksIterations, ObjectiveTraits, why_no_gradient
from diffusion_rtb.config.sections import BetaConfig, RunConfig
from diffusion_rtb.interfaces import AimsStates, FollowsReward, Objective, Reward
from diffusion_rtb.needs import instead
from diffusion_rtb.run.members import check_objective_members
from diffusion_rtb.scoring.memory import moving_rewards
from diffusion_rtb.training.chain_checks import check_configured_steps

if TYPE_CHECKING:
    from diffusion_rtb.behaviours._mixture import Mixture
    from diffusion_rtb.run.checks import Components

__all__ = [
    "check_behaviours",
    "check_beta",
    "check_drawn_together",
    "check_gradient",
    "check_group",
    "check_measured",
    "check_owner",
    "check_pairs",
    "check_processes",
    "check_ranked",
    "check_reward_memory",
    "check_samples",
    "check_settings",
    "check_step_choice",
    "check_unmeasured",
    "check_updates",
]


def check_settings(config: RunConfig, objective: Objective, mixture: Mixture) -> None:
    """The checks here that need nothing loaded: the objective's members, behaviours, beta, updates and steps."""
    check_objective_members(objective)
    check_behaviours(objective, mixture)
    check_samples(objective, mixture)
    check_measured(config.beta, objective, mixture)
    check_beta(objective, config.beta)
    check_updates(objective, config.train.updates_per_iteration)
    check_group(objective, config.train.group)
    check_drawn_together(config, mixture)
    check_pairs(config, objective, mixture)
    check_configured_steps(config, objective)
    check_step_choice(config, objective)
    check_unmeasured(config, objective, mixture)
    if isinstance(objective, ChecksIterations):
        objective.check_iterations(config.train.iterations)


def check_unmeasured(config: RunConfig, objective: Objective, mixture: Mixture) -> None:
    """Refuse to leave trajectories unscored that something other than the log reads the densities of."""
    every, told = (
        config.train.measure_every,
        f"train.measure_every {config.train.measure_every} leaves trajectories unscored, and",
    )
    if every == 1:
        return
    if not isinstance(objective, AimsStates):
        raise ValueError(f"{told} objective {config.objective.component} learns from their densities: set it to 1.")
    if config.beta.kl_budget is not None:
        raise ValueError(f"{told} beta.kl_budget follows their KL: set it to 1, or kl_budget to null.")
    if any(source.name == "replay" for source in mixture.drawing):
        raise ValueError(f"{told} behaviour replay keeps them with their densities: set it to 1, or take replay out.")


def check_step_choice(config: RunConfig, objective: Objective) -> None:
    """Refuse to draw steps by their gradients for an objective whose gradient is that of whole trajectories."""
    if config.train.step_choice == "importance" and not isinstance(objective, AimsStates):
        raise ValueError(
            f"train.step_choice importance is for objectives of noised samples (value_gradient, ram, reward_weighted, ...), and "
            f"{config.objective.component} is none: set it to stratified."
        )


def check_behaviours(objective: Objective, mixture: Mixture) -> None:
    """Refuse other trajectories than the posterior's own for an on-policy objective, and such as nobody knows the density of for
    one that weighs them by importance.
    """
    name = type(objective).__name__
    traits = ObjectiveTraits.of(objective)
    wrong = [s for s in mixture.drawing if s.off_policy and not (traits.bears_posterior and s.posterior_like)]
    others = [type(source).__name__ for source in wrong]
    if traits.on_policy_only and others:
        raise ValueError(
            f"objective {name} is on-policy: its gradient is an average over the posterior's own trajectories, and wrong on "
            f"those of behaviours {', '.join(others)}. Take them out, and on_policy without exploration; or use an "
            f"importance-weighted objective. {instead('own', 'objective')}"
        )
    unknown = [source.density_unknown for source in mixture.drawing if source.density_unknown]
    if traits.importance_weighted and unknown:
        raise ValueError(
            f"objective {name} weighs trajectories by q / (density they were drawn with), which nobody knows {unknown[0]}. "
            f"{instead('density', 'objective')}"
        )


def check_gradient(config: RunConfig, components: Components) -> None:
    """Refuse a reward or a prior without a gradient for an objective that follows it, and settings that it cannot heed."""
    constructed = components.objective.construct()
    if not ObjectiveTraits.of(constructed).needs_gradient:
        return
    objective, why = config.objective.component, why_no_gradient(components.reward.ahead())
    if why:
        raise ValueError(
            f"objective {objective} follows the gradient of the reward, and reward {config.reward.component!r} has none: {why}. "
            f"{instead('gradient', 'objective')}"
        )
    if not hasattr(components.prior.target, "decode_with_gradient"):
        raise ValueError(
            f"objective {objective} needs images with a gradient in x_0, and prior {config.prior.component!r} has no method "
            f"decode_with_gradient (abilities.DecodesWithGradient): write it. {instead('decoder', 'objective')}"
        )
    for name in ("gradient_steps", "step_weights"):
        if isinstance(constructed, FollowsReward) and getattr(config.train, name) is not None:
            raise ValueError(
                f"objective {objective} takes one gradient through all of its last steps, and train.{name} is for gradients of "
                "single steps: set it to null. `last_steps` of the objective makes an update cheaper."
            )


def check_ranked(config: RunConfig, components: Components, mixture: Mixture) -> None:
    """Refuse pairs from a folder for objectives that read more than their order, and priors that take no pictures; lacking ones."""
    traits = ObjectiveTraits.of(components.objective.construct())
    drawing = mixture.drawing
    for source in drawing:
        source.check_prompts(config.prompts.texts())
    ranked = [type(source).__name__ for source in drawing if source.ranked]
    if ranked and not traits.reads_order:
        raise ValueError(
            f"objective {config.objective.component} with these settings reads rewards as numbers, and behaviour {ranked[0]} knows "
            f"which picture of a pair is better, not by how much. {instead('rewards', 'objective')}"
        )
    if ranked and not hasattr(components.prior.target, "latents_of"):
        raise ValueError(
            f"behaviour {ranked[0]} has pictures, and prior {config.prior.component!r} has no method latents_of that takes them "
            "for samples (abilities.Encodes): write it, or take stable_diffusion."
        )
    if traits.leaves_own and len(drawing) < 2:
        raise ValueError(
            f"objective {config.objective.component} with own: false leaves the posterior's own samples alone, and there are no "
            "others: add a behaviour, or set own: true."
        )


def check_samples(objective: Objective, mixture: Mixture) -> None:
    """Refuse an objective whose targets are samples of the posterior where no behaviour has such, noised."""
    if ObjectiveTraits.of(objective).learns_samples and not any(source.tilted for source in mixture.drawing):
        raise ValueError(
            f"objective {type(objective).__name__} takes samples of the posterior as targets (from_samples), and no behaviour "
            "draws them noised: add {component: prior_buffer, share: 0.5, resample: true, noised: true} to behaviours, or set "
            f"from_samples 0. {instead('samples', 'objective')}"
        )


def check_measured(beta: BetaConfig, objective: Objective, mixture: Mixture) -> None:
    """Refuse a `kl_budget` without a KL to measure: what was drawn is wider, or an older posterior's."""
    source, older = mixture.on_policy, ObjectiveTraits.of(objective).draws_old
    if beta.kl_budget is not None and (older or source.exploration > 0) and source.measured == 0:
        why = "an older posterior draws what is learned from" if older else "explored trajectories are wider"
        raise ValueError(
            f"measured 0 of on_policy leaves beta.kl_budget without a KL to measure: {why}; give it a share of the group, "
            "e.g. 0.25."
        )


def check_reward_memory(reward: Reward, objective: Objective, mixture: Mixture) -> None:
    """Refuse rewards that go on changing beside what is kept with the rewards of one day: trajectories, or a V learned once."""
    moving = moving_rewards(reward)
    kept = [type(source).__name__ for source in mixture.drawing if source.kept(1, 1) is not None]
    keeping = [f"behaviour {name} keeps trajectories" for name in kept]
    if ObjectiveTraits.of(objective).value_stays:
        keeping.append(f"objective {type(objective).__name__} with these settings keeps its V")
    judging = [f"behaviour {type(source).__name__}" for source in mixture.drawing if source.judges_estimates]
    if ObjectiveTraits.of(objective).estimates_every:
        judging.append(f"objective {type(objective).__name__} with these settings")
    if moving and judging:
        raise ValueError(
            f"reward {moving[0]} goes on learning of what it judges, and {judging[0]} lets it judge unfinished samples. "
            "Let it stay (standardise: a number of samples, or mean and std), or do without the other."
        )
    if moving and keeping:
        raise ValueError(
            f"reward {moving[0]} goes on changing while training, and {keeping[0]} with the rewards of their day. Let it stay "
            f"(standardise: a number of samples, or mean and std), or do without the other. {instead('reward', 'objective')}"
        )


def check_beta(objective: Objective, beta: BetaConfig) -> None:
    """Refuse to move beta under a V that stays as its warm-up left it, and so belongs to one beta."""
    if beta.moved_by is not None and ObjectiveTraits.of(objective).value_stays:
        raise ValueError(
            f"objective {type(objective).__name__} with these settings learns V once, for one beta, and {beta.moved_by} moves "
            f"beta. Use one whose V goes on learning (trust_pcl with value_loss: consistency), or no {beta.moved_by}. "
            f"{instead('beta', 'objective')}"
        )


def check_updates(objective: Objective, updates: int) -> None:
    """Refuse several updates on the same trajectories for an on-policy objective that does not notice the posterior moving.

    Those that clip ratios to the chain that drew do, those that learn from an older posterior's samples have no other, and some
    have targets that hold for a while (`bears_updates`).
    """
    traits = ObjectiveTraits.of(objective)
    if updates > 1 and traits.on_policy_only and not (traits.clips_ratios or traits.draws_old or traits.bears_updates):
        raise ValueError(
            f"objective {type(objective).__name__} is on-policy and has no ratios to the chain that drew: from the second of "
            f"train.updates_per_iteration {updates} on, the trajectories are those of another posterior. Set that to 1, or use "
            f"trust_pcl, reinforce_kl with importance weights, grpo, dpok or ddpo. {instead('newest', 'objective')}"
        )


def check_group(objective: Objective, group: int) -> None:
    """Refuse groups too small for an objective that compares the trajectories of a prompt and says so (`smallest_group`)."""
    smallest = ObjectiveTraits.of(objective).smallest_group
    if group < smallest:
        raise ValueError(
            f"train.group is {group}, and objective {type(objective).__name__} compares the trajectories of one prompt: it needs "
            f"train.group {smallest} or more. {instead('group', 'objective')}"
        )


def check_drawn_together(config: RunConfig, mixture: Mixture) -> None:
    """Refuse behaviours that draw more trajectories of a prompt together than a micro-batch holds."""
    for source in mixture.drawing:
        if source.drawn_together > config.train.micro_batch:
            raise ValueError(
                f"behaviour {type(source).__name__} draws {source.drawn_together} particles in one call, and train.micro_batch is "
                f"{config.train.micro_batch}: raise that, or take fewer particles."
            )


def check_pairs(config: RunConfig, objective: Objective, mixture: Mixture) -> None:
    """Refuse micro-batches that part the samples of a prompt unevenly, for an objective that compares them within one."""
    micro = config.train.micro_batch
    if not ObjectiveTraits.of(objective).pairs_states:
        return
    for source, count in mixture.values():
        if count > 0 and (min(micro, count) < 2 or (micro % count and count % micro)):
            raise ValueError(
                f"objective {type(objective).__name__} compares the samples of a prompt within a micro-batch, and "
                f"train.micro_batch {micro} parts the {count} of {type(source).__name__} unevenly: make one a multiple of the "
                f"other, both at least 2. {instead('group', 'objective')}"
            )


def check_processes(config: RunConfig, mixture: Mixture, processes: int) -> None:
    """Refuse several processes that cannot share the prompts evenly, or with a memory that only one of them would know."""
    if processes < 2:
        return
    count = config.train.prompts_per_iteration
    if count % processes:
        fitting = [str(n) for n in range(processes, len(config.prompts.texts()) + 1, processes)]
        remedy = f"use {', '.join(fitting[:8])}" if fitting else "start fewer processes, or add prompts"
        raise ValueError(
            f"train.prompts_per_iteration {count} cannot be shared evenly by {processes} processes, which would give some prompts "
            f"more weight than others: {remedy}."
        )
    for source in mixture.drawing:
        if source.remembers:
            raise ValueError(
                f"behaviour {type(source).__name__} keeps past trajectories in the process that drew them, and checkpoints keep "
                f"those of one; there are {processes}: {source.remembers}, or use one process."
            )


def check_owner(objective: Objective, owns_parameters: bool, processes: int) -> None:
    """Refuse several processes for an objective with parameters of its own."""
    if owns_parameters and processes > 1:
        raise ValueError(
            f"objective {type(objective).__name__} has parameters of its own (log Z or V), which are not shared between "
            f"{processes} processes. Use log_z: vargrad, or one process. {instead('process', 'objective')}"
        )
