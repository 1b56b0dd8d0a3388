"""Objectives get no trajectories that they would take for something they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from diffusion_rtb.config.load import ConfigError, RunConfig, load_config, save_config
from diffusion_rtb.config.sections import BehaviourConfig
from diffusion_rtb.interfaces import Objective
from diffusion_rtb.objectives.ddpo import DDPO
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.reinforce_naive import ReinforceNaive
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.compatibility import (
    check_behaviour,
    check_beta,
    check_owner,
    check_processes,
    check_reward_memory,
    check_settings,
    check_steps,
    check_updates,
)
from pipelines.gaussian import Gaussian
from rewards.standardise import Standardise
from rewards.weighted_sum import WeightedSum


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
        (ON_POLICY, {"replay": {"share": 0.5}}, r"on-policy.*behaviour\.replay\.share"),
        (ON_POLICY, {"back_and_forth": {"share": 0.5}}, r"on-policy.*behaviour\.back_and_forth\.share"),
        (weighted, {"prior_share": 0.5}, r"TrustPCL weighs trajectories.*resample: false"),
        (weighted, {"replay": {"share": 0.5, "priority": "reward"}}, r"priority 'reward'.*replay\.priority: uniform"),
        (weighted, {"replay": {"share": 0.5, "priority": "importance"}}, r"priority 'importance'"),
        (weighted, {"back_and_forth": {"share": 0.5}}, r"an integral over the good samples.*back_and_forth\.share: 0"),
    ],
)
def test_unfit_behaviours_are_refused(build: Callable[[], Objective], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_behaviour(build(), behaviour(**settings))


@pytest.mark.parametrize("moving", [{"anneal": {"start": 0.1, "iterations": 5}}, {"kl_budget": {"nats": 1.0}}])
def test_a_value_that_stays_refuses_a_beta_that_moves(moving: dict[str, Any]) -> None:
    beta = run(beta={"value": 1.0, **moving}).beta
    with pytest.raises(
        ValueError, match=rf"one beta, and beta\.{next(iter(moving))} moves beta.*value_loss: consistency"
    ):
        check_beta(TrustPCL(length=1, value_loss="none", warm_up_updates=5), beta)
    check_beta(TrustPCL(length=1), beta)
    check_beta(TrustPCL(length=1, value_loss="none", warm_up_updates=5), run().beta)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (ON_POLICY, {}),
        (weighted, {"prior_share": 0.5, "resample": False}),
        (weighted, {"exploration": {"scale": 0.5, "until": 9}}),
        (RTB, {"prior_share": 0.5, "exploration": {"scale": 0.5, "until": 9}}),
        (weighted, {"replay": {"share": 0.5}}),
        (
            RTB,
            {"replay": {"share": 0.25, "priority": "reward"}, "back_and_forth": {"share": 0.25}, "prior_share": 0.25},
        ),
    ],
)
def test_others_are_not(build: Callable[[], Objective], settings: dict[str, Any]) -> None:
    check_behaviour(build(), behaviour(**settings))


def test_an_objective_that_learns_needs_one_process() -> None:
    check_owner(RTB(), owns_parameters=True, processes=1)
    check_owner(RTB(), owns_parameters=False, processes=2)
    with pytest.raises(ValueError, match=r"RTB has parameters of its own.* 2 processes"):
        check_owner(RTB(), owns_parameters=True, processes=2)


def test_a_memory_needs_one_process() -> None:
    two = {"prompts": {"list": ["a", "b"]}, "train": {"prompts_per_iteration": 2, "group": 8, "micro_batch": 8}}
    for key, settings in {
        "replay.share": {"replay": {"share": 0.5}},
        "back_and_forth.share": {"back_and_forth": {"share": 0.5}},
        "refresh": {"prior_share": 0.5, "refresh": 1},
    }.items():
        remembering = run(**two, behaviour=settings)
        check_processes(remembering, 1)
        with pytest.raises(ValueError, match=rf"behaviour\.{key} keeps past trajectories.*there are 2"):
            check_processes(remembering, 2)
    check_processes(run(**two, behaviour={"prior_share": 0.5}), 2)
    check_processes(run(**two, behaviour={"refresh": 1}), 2)  # nothing is taken from the buffer


@pytest.mark.parametrize(
    ("prompts", "count", "processes", "remedy"),
    [
        (3, 3, 2, "use 2"),
        (1, 1, 2, "start fewer processes, or add prompts"),
        (9, 2, 3, "use 3, 6, 9"),
        (9, 8, 3, "use 3, 6, 9"),
    ],
)
def test_prompts_that_processes_cannot_share_are_refused(prompts: int, count: int, processes: int, remedy: str) -> None:
    config = run(
        prompts={"list": [f"prompt {i}" for i in range(prompts)]},
        train={"prompts_per_iteration": count, "group": 2, "micro_batch": 2},
    )
    check_processes(config, 1)
    with pytest.raises(ValueError, match=rf"prompts_per_iteration {count} .* by {processes} processes.*{remedy}\."):
        check_processes(config, processes)


def test_a_warm_up_without_trajectories_is_refused() -> None:
    unfit = run(objective={"component": "trust_pcl", "length": 1, "warm_up_updates": 5}, behaviour={"prior_buffer": 0})
    with pytest.raises(ValueError, match=r"warms up for 5 updates.*prior_buffer 0 draws none"):
        check_settings(unfit, TrustPCL(length=1, warm_up_updates=5))
    check_settings(unfit, TrustPCL(length=1))


@pytest.mark.parametrize(
    "settings", [{"prior_share": 0.5}, {"replay": {"share": 0.5}}, {"back_and_forth": {"share": 0.5}}]
)
def test_what_is_kept_needs_a_reward_that_stays(settings: dict[str, Any]) -> None:
    inner = {"component": "brightness"}
    moving = WeightedSum([{"component": "standardise", "reward": inner, "samples": None}])
    with pytest.raises(ValueError, match=r"reward Standardise goes on changing.*behaviour\.\w+(\.share)? keeps traj"):
        check_reward_memory(moving, RTB(), behaviour(**settings))
    check_reward_memory(moving, RTB(), behaviour())
    check_reward_memory(Standardise(inner), RTB(), behaviour(**settings))
    check_reward_memory(Standardise(inner, mean=0.0, std=1.0, samples=None), RTB(), behaviour(**settings))


def test_a_value_that_stays_needs_a_reward_that_does() -> None:
    frozen = TrustPCL(length=1, value_loss="none", warm_up_updates=5)
    with pytest.raises(ValueError, match=r"value_loss: none keeps its V"):
        check_reward_memory(Standardise({"component": "brightness"}, samples=None), frozen, behaviour())
    check_reward_memory(Standardise({"component": "brightness"}), frozen, behaviour())


@pytest.mark.parametrize("build", [ReinforceNaive, ReinforceKL])
def test_several_updates_need_ratios(build: Callable[[], Objective]) -> None:
    check_updates(build(), 1)
    with pytest.raises(ValueError, match=rf"{build().__class__.__name__} is on-policy.*updates_per_iteration 2"):
        check_updates(build(), 2)


@pytest.mark.parametrize("build", [RTB, TrustPCL, DDPO, DPOK, GRPO, lambda: ReinforceKL(importance="exact")])
def test_others_take_several_updates(build: Callable[[], Objective]) -> None:
    check_updates(build(), 3)


@pytest.mark.parametrize(
    "arguments", [{"num_inference_steps": 6}, {"num_inference_steps": 50, "timesteps": [9, 8, 7, 5, 2, 1]}]
)
def test_a_length_that_does_not_divide_the_steps_is_refused(arguments: dict[str, Any]) -> None:
    for length in (1, 2, 3, 6, None):
        check_steps(TrustPCL(length=length), arguments)
    with pytest.raises(ValueError, match=r"length=4 does not divide the trajectory's 6 steps.*1, 2, 3, 6"):
        check_steps(TrustPCL(length=4), arguments)


def test_a_run_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    unfit = run(out=str(tmp_path), objective={"component": "trust_pcl", "length": 3})
    with pytest.raises(ValueError, match=r"length=3 does not divide.* 20 steps"):
        assemble(unfit)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"component": "rtb", "loss": "cubic"}}, "loss"),
        ({"objective": {"component": "rtb", "dead_zone": -1.0}}, "dead_zone"),
        ({"objective": {"component": "trust_pcl", "length": 0}}, "length must be at least 1"),
        ({"objective": {"component": "trust_pcl", "length": 2, "log_z": "learned"}}, "log_z='learned' is for whole"),
        ({"objective": {"component": "trust_pcl", "value_loss": "none"}}, "leaves V untrained"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_loaded(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_components(run(**sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"behaviour": {"replay": {"share": 0.3}}},
            r"behaviour\.replay\.share 0\.3 .* is 2\.4 trajectories.*0, 0\.125",
        ),
        ({"behaviour": {"back_and_forth": {"share": 0.1}}}, r"behaviour\.back_and_forth\.share 0\.1"),
        (
            {"behaviour": {"prior_share": 0.5, "replay": {"share": 0.5}}},
            r"prior_share 0\.5, replay\.share 0\.5 together",
        ),
        ({"behaviour": {"replay": {"capacity": 0}}}, "greater than 0"),
        ({"behaviour": {"back_and_forth": {"depth": 0.0}}}, "greater than 0"),
        ({"behaviour": {"back_and_forth": {"depth": 1.5}}}, "less than or equal to 1"),
        ({"beta": {"value": 1.0, "kl_budget": {"nats": 0.0}}}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(**sections)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("behaviour.replai.share=0.5", "behaviour.replay"),
        ("behaviour.back_and_fort.share=0.5", "behaviour.back_and_forth"),
        ("beta={value: 1.0, kl_buget: {nats: 1.0}}", "beta.kl_budget"),
        ("behaviour.replay.capasity=9", "behaviour.replay.capacity"),
        ("behaviour.back_and_forth.dept=0.5", "behaviour.back_and_forth.depth"),
    ],
)
def test_an_unknown_behaviour_or_setting_names_the_nearest(key: str, meant: str, tmp_path: Path) -> None:
    save_config(run(), tmp_path)
    with pytest.raises(ConfigError, match=rf"Did you mean '{meant}'"):
        load_config(tmp_path, [key])


LORA = "It has: rank, alpha, target_modules, seed"


@pytest.mark.parametrize(
    ("prior", "posterior", "messages"),
    [
        ("gaussian", {"rank": 8}, ["posterior: attach of prior 'gaussian' has no argument 'rank'. It has: none."]),
        ("gmm", {"alpha": 8.0}, ["posterior: attach of prior 'gmm' has no argument 'alpha'. It has: seed."]),
        (
            "stable_diffusion",
            {"rnk": 8, "alpha": "high", "target_modules": [], "rank": 0},
            [
                f"no argument 'rnk'. Did you mean 'rank'? {LORA}",
                "got 'high'",
                "argument 'target_modules': got []",
                "got 0 (int)",
            ],
        ),
    ],
)
def test_posterior_holds_what_the_prior_s_attach_takes(
    prior: str, posterior: dict[str, Any], messages: list[str]
) -> None:
    """All that is wrong is said at once, and before a prior is loaded."""
    needed: dict[str, dict[str, Any]] = {"gaussian": {"mean": [0.0]}, "stable_diffusion": {"path": "emoji"}}
    with pytest.raises(ValueError, match="attach of prior") as refused:
        describe_components(run(prior={"component": prior, **needed.get(prior, {})}, posterior=posterior))
    assert all(message in str(refused.value) for message in messages)


def test_attach_gets_what_the_config_gives_and_the_seed_of_the_run() -> None:
    class Noting(Gaussian):
        def attach(self, *, width: int, seed: int = 0) -> None:  # type: ignore[override]
            super().attach()
            self.got = width, seed

    for posterior, expected in (({"width": 3}, (3, 5)), ({"width": 3, "seed": 1}, (3, 1))):
        prior = Noting([0.0])
        attach_posterior(run(posterior=posterior, seed=5), prior)
        assert prior.got == expected
    with pytest.raises(ValueError, match="needs 'width'"):
        attach_posterior(run(), Noting([0.0]))
