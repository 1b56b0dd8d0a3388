"""Objectives get no trajectories that they would take for something they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diffusion_rtb.config import RunConfig
from diffusion_rtb.fitness import check_behaviour, check_processes
from diffusion_rtb.interfaces import Objective
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.settings import BehaviourConfig
from diffusion_rtb.training_state import attach_posterior
from pipelines.gaussian import Gaussian


def behaviour(**settings: Any) -> BehaviourConfig:
    return BehaviourConfig.model_validate(settings)


def run(**sections: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "fit",
        "prior": {"component": "gaussian", "mean": [0.0]},
        "reward": {"component": "density", "density": {"linear": [1.0]}},
        "beta": 1.0,
        "prompts": {"list": [""]},
        "train": {"prompts_per_iteration": 1, "group": 8, "micro_batch": 8},
    }
    return RunConfig.model_validate(data | sections)


ON_POLICY: Callable[[], Objective] = ReinforceKL


def weighted() -> Objective:
    return TrustPCL(length=1, value_loss="returns")


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (ON_POLICY, {"prior_share": 0.5}, r"ReinforceKL is on-policy.*behaviour\.prior_share"),
        (ON_POLICY, {"exploration": {"scale": 0.5, "until": 9}}, r"on-policy.*behaviour\.exploration\.scale"),
        (weighted, {"prior_share": 0.5}, r"TrustPCL weighs trajectories.*resample: false"),
    ],
)
def test_unfit_behaviours_are_refused(build: Callable[[], Objective], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_behaviour(build(), behaviour(**settings))


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (ON_POLICY, {}),
        (weighted, {"prior_share": 0.5, "resample": False}),
        (weighted, {"exploration": {"scale": 0.5, "until": 9}}),
        (RTB, {"prior_share": 0.5, "exploration": {"scale": 0.5, "until": 9}}),
    ],
)
def test_others_are_not(build: Callable[[], Objective], settings: dict[str, Any]) -> None:
    check_behaviour(build(), behaviour(**settings))


def test_an_objective_that_learns_needs_one_process() -> None:
    check_processes(RTB(), owns_parameters=True, processes=1)
    check_processes(RTB(), owns_parameters=False, processes=2)
    with pytest.raises(ValueError, match=r"RTB has parameters of its own.* 2 processes"):
        check_processes(RTB(), owns_parameters=True, processes=2)


@pytest.mark.parametrize("posterior", [{}, {"rank": 8}])
def test_a_prior_without_layers_is_not_given_the_defaults_of_lora(posterior: dict[str, Any]) -> None:
    prior = Gaussian([0.0])
    attach_posterior(run(posterior=posterior), prior)
    assert prior.parameters()


def test_a_prior_without_layers_refuses_what_was_asked_of_lora() -> None:
    with pytest.raises(ValueError, match=r"posterior\.rank=4.*has no layers"):
        attach_posterior(run(posterior={"rank": 4}), Gaussian([0.0]))
