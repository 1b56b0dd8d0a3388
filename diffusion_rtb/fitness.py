"""Does an objective fit the behaviour and the processes of a run? What does not is refused before anything is drawn."""

from __future__ import annotations

from diffusion_rtb.interfaces import Objective
from diffusion_rtb.settings import BehaviourConfig

__all__ = ["check_behaviour", "check_processes"]


def check_behaviour(objective: Objective, behaviour: BehaviourConfig) -> None:
    """Refuse behaviours whose trajectories the objective would take for something they are not.

    Raises:
        ValueError: other trajectories than the posterior's own for an on-policy objective, or trajectories selected by their
            reward for one that weighs them by importance.
    """
    name, from_prior = type(objective).__name__, behaviour.prior_share > 0
    if getattr(objective, "on_policy_only", False) and (from_prior or behaviour.exploration.scale > 0):
        setting = "prior_share" if from_prior else "exploration.scale"
        raise ValueError(
            f"objective {name} is on-policy: its gradient is an average over the posterior's own trajectories, and wrong on "
            f"those that behaviour.{setting} brings. Set that to 0, or use rtb, trust_pcl or an importance-weighted objective."
        )
    if getattr(objective, "importance_weighted", False) and from_prior and behaviour.resample:
        raise ValueError(
            f"objective {name} weighs trajectories by q / (density they were drawn with), which nobody knows once they are "
            "selected by their reward. Set behaviour.resample: false, or use rtb or trust_pcl."
        )


def check_processes(objective: Objective, owns_parameters: bool, processes: int) -> None:
    """Refuse several processes for an objective that learns: it is set from its first batch, another one in each.

    Raises:
        ValueError: it has parameters of its own, and there are several processes.
    """
    if owns_parameters and processes > 1:
        raise ValueError(
            f"objective {type(objective).__name__} has parameters of its own (log Z or V), which are not shared between "
            f"{processes} processes. Use log_z: vargrad, or one process."
        )
