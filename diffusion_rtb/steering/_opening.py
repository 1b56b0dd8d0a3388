"""What `sample --steer` starts from, a run or a config; what a method lacks there is refused before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_rtb.abilities import KnowsSampler, LearnsValue
from diffusion_rtb.chain.forward_process import network_predicts
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.needs import instead
from diffusion_rtb.out_of_memory import doing
from diffusion_rtb.run.checks import Components, describe_components, paths_explained
from diffusion_rtb.run.folder import find_run, is_run
from diffusion_rtb.run.posterior import TrainedRun, open_trained_run
from diffusion_rtb.scoring.memory import wanting_rewards
from diffusion_rtb.steering._method import Method

__all__ = ["Steerable", "open_steerable"]


@dataclass(frozen=True, eq=False)
class Steerable:
    """A prior and a reward that are not loaded yet."""

    config: RunConfig
    folder: Path
    components: Components
    trained: TrainedRun | None
    """None: there is a config alone, or the prior alone was asked for."""

    @property
    def beta(self) -> float:
        """Nats per unit of reward: what was trained for, or is to be."""
        return self.config.beta.value if self.trained is None else self.trained.progress.beta

    def prior(self) -> Prior:
        """Loaded, with the posterior where there is one."""
        if self.trained is not None:
            return self.trained.prior()
        with paths_explained(self.folder), doing("loading the prior"):
            prior: Prior = self.components.prior.build()
        return prior

    def learned(self, prior: Prior) -> Callable[..., Tensor] | None:
        """V of the run's objective, where it learns one, on the prior's device."""
        objective = self.components.objective.construct()
        if self.trained is None or not _learns_value(objective):
            return None
        prompts = self.config.prompts.texts()
        objective.prepare(len(prompts), prior.dims, prior.features(prompts[:1]).shape[1])
        objective.load_state_dict(dict(self.trained.checkpoint.tensors["objective"]))
        value: Callable[..., Tensor] = objective.to(prior.device).requires_grad_(False).value
        return value

    def reward(self) -> Reward:
        """Loaded.

        Raises:
            ValueError: it learns from samples of the prior, and nobody has shown it any.
        """
        if self.trained is not None:
            held: Reward = self.trained.reward()
            return held
        with paths_explained(self.folder), doing("loading the reward"):
            reward: Reward = self.components.reward.build()
        if wanting_rewards(reward):
            raise ValueError(
                f"reward {self.config.reward.component!r} learns its statistics from samples of the prior when a run begins, and "
                "this is a config alone: give the folder of a run that was trained, or standardise's mean and std."
            )
        return reward


def open_steerable(run: Path, checkpoint: str | None, method: Method) -> Steerable:
    """Read a run or a config; nothing is loaded.

    Args:
        run: A run's folder, or a config.
        checkpoint: Of a trained run, see `open_trained_run`; None: its prior alone.
        method: What is to be done with it.

    Raises:
        ValueError: it lacks what the method needs, or is none.
    """
    trained = (
        open_trained_run(run, checkpoint=checkpoint)
        if checkpoint is not None and run.is_dir() and is_run(run)
        else None
    )
    if trained is not None:
        _check_value(method, trained.config.objective.component, trained.components.objective.construct())
        _check_estimate(method, trained.components)
        return Steerable(trained.config, trained.folder, trained.components, trained)
    _check_value(method, None, None)
    config, folder = find_run(run)
    if method.of_posterior:
        raise ValueError(
            f"{type(method).__name__} mixes a posterior with its prior, and here is a prior alone: give the folder of a run that "
            f"was trained, without --prior. {instead('posterior', 'steering')}"
        )
    with paths_explained(folder):
        components = describe_components(config)
    _check_estimate(method, components)
    return Steerable(config, folder, components, None)


def _learns_value(objective: Any) -> bool:
    return isinstance(objective, LearnsValue) and objective.learns_value


def _check_value(method: Method, name: str | None, objective: Any) -> None:
    """Refuse a value that is to be learned where there is none."""
    if method.value == "reward" or _learns_value(objective):
        return
    other = "; or use value: reward" if method.weighs else ""
    here = "this is no trained run" if name is None else f"objective {name!r} of the run learns none"
    raise ValueError(
        f"{type(method).__name__} with value {method.value!r} needs a V, and {here}. Give a run trained with value_gradient, "
        f"or with trust_pcl and a length, without --prior{other}. {instead('value', 'steering')}"
    )


def _check_estimate(method: Method, components: Components) -> None:
    """Refuse values of x0_hat where a network's answer does not tell it, if the prior knows its scheduler before weights load."""
    prior = components.prior.ahead()
    sampler = prior.known_sampler if isinstance(prior, KnowsSampler) else None
    if sampler is not None and method.weighs and method.value != "learned":
        try:
            network_predicts(sampler)
        except ValueError as error:
            raise ValueError(f"{type(method).__name__} weighs states by r(x0_hat). {error}") from None
