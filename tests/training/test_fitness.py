"""Objectives get no trajectories that they would take for something they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.behaviours._mixture import Mixture, sources
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.interfaces import Objective
from diffusion_rtb.objectives.ddpo import DDPO
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.reinforce_naive import ReinforceNaive
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.run.folder import open_run
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.chain_checks import check_steps
from diffusion_rtb.training.compatibility import (
    check_behaviours,
    check_beta,
    check_owner,
    check_processes,
    check_reward_memory,
    check_updates,
)
from pipelines.gaussian import Gaussian
from rewards.standardise import Standardise
from rewards.weighted_sum import WeightedSum


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


def mixture(*behaviours: dict[str, Any]) -> Mixture:
    return sources(run(behaviours=behaviours))


ON_POLICY: Callable[[], Objective] = ReinforceKL


def weighted() -> Objective:
    return TrustPCL(length=1, value_loss="returns")


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (ON_POLICY, [{"component": "prior_buffer", "share": 0.5}], r"ReinforceKL is on-policy.*behaviours PriorBuffer"),
        (ON_POLICY, [{"component": "on_policy", "exploration": 0.5, "until": 9}], r"on-policy.*behaviours OnPolicy"),
        (ON_POLICY, [{"component": "replay", "share": 0.5}], r"on-policy.*behaviours Replay"),
        (ON_POLICY, [{"component": "back_and_forth", "share": 0.5}], r"on-policy.*behaviours BackAndForth"),
        (weighted, [{"component": "prior_buffer", "share": 0.5}], r"TrustPCL weighs trajectories.*resample: false"),
        (
            weighted,
            [{"component": "replay", "share": 0.5, "priority": "reward"}],
            r"priority 'reward'.*replay `priority: uniform`",
        ),
        (weighted, [{"component": "replay", "share": 0.5, "priority": "importance"}], r"priority 'importance'"),
        (
            weighted,
            [{"component": "back_and_forth", "share": 0.5}],
            r"an integral over the good samples.*Take back_and_forth out",
        ),
    ],
)
def test_unfit_behaviours_are_refused(
    build: Callable[[], Objective], settings: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_behaviours(build(), mixture(*settings))


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
        (ON_POLICY, []),
        (weighted, [{"component": "prior_buffer", "share": 0.5, "resample": False}]),
        (weighted, [{"component": "on_policy", "exploration": 0.5, "until": 9}]),
        (
            RTB,
            [{"component": "on_policy", "exploration": 0.5, "until": 9}, {"component": "prior_buffer", "share": 0.5}],
        ),
        (weighted, [{"component": "replay", "share": 0.5}]),
        (
            RTB,
            [
                {"component": "prior_buffer", "share": 0.25},
                {"component": "replay", "share": 0.25, "priority": "reward"},
                {"component": "back_and_forth", "share": 0.25},
            ],
        ),
    ],
)
def test_others_are_not(build: Callable[[], Objective], settings: list[dict[str, Any]]) -> None:
    check_behaviours(build(), mixture(*settings))


def test_an_objective_that_learns_needs_one_process() -> None:
    check_owner(RTB(), owns_parameters=True, processes=1)
    check_owner(RTB(), owns_parameters=False, processes=2)
    with pytest.raises(ValueError, match=r"RTB has parameters of its own.* 2 processes"):
        check_owner(RTB(), owns_parameters=True, processes=2)


def test_a_memory_needs_one_process() -> None:
    two = {"prompts": {"list": ["a", "b"]}, "train": {"prompts_per_iteration": 2, "group": 8, "micro_batch": 8}}
    for key, settings in {
        "Replay": [{"component": "replay", "share": 0.5}],
        "BackAndForth": [{"component": "back_and_forth", "share": 0.5}],
        "PriorBuffer": [{"component": "prior_buffer", "share": 0.5, "refresh": 1}],
    }.items():
        remembering = run(**two, behaviours=settings)
        check_processes(remembering, sources(remembering), 1)
        with pytest.raises(ValueError, match=rf"behaviour {key} keeps past trajectories.*there are 2"):
            check_processes(remembering, sources(remembering), 2)
    check_processes(run(**two), mixture({"component": "prior_buffer", "share": 0.5}), 2)
    check_processes(
        run(**two), mixture({"component": "prior_buffer", "refresh": 1}), 2
    )  # nothing is taken from the buffer


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
    check_processes(config, sources(config), 1)
    with pytest.raises(ValueError, match=rf"prompts_per_iteration {count} .* by {processes} processes.*{remedy}\."):
        check_processes(config, sources(config), processes)


@pytest.mark.parametrize(
    "settings",
    [
        [{"component": "prior_buffer", "share": 0.5}],
        [{"component": "replay", "share": 0.5}],
        [{"component": "back_and_forth", "share": 0.5}],
    ],
)
def test_what_is_kept_needs_a_reward_that_stays(settings: list[dict[str, Any]]) -> None:
    inner = {"component": "brightness"}
    moving = WeightedSum([{"component": "standardise", "reward": inner, "samples": None}])
    with pytest.raises(ValueError, match=r"reward Standardise goes on changing.*behaviour \w+ keeps traj"):
        check_reward_memory(moving, RTB(), mixture(*settings))
    check_reward_memory(moving, RTB(), mixture())
    check_reward_memory(Standardise(inner), RTB(), mixture(*settings))
    check_reward_memory(Standardise(inner, mean=0.0, std=1.0, samples=None), RTB(), mixture(*settings))


def test_a_value_that_stays_needs_a_reward_that_does() -> None:
    frozen = TrustPCL(length=1, value_loss="none", warm_up_updates=5)
    with pytest.raises(ValueError, match=r"keeps its V"):
        check_reward_memory(Standardise({"component": "brightness"}, samples=None), frozen, mixture())
    check_reward_memory(Standardise({"component": "brightness"}), frozen, mixture())


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
            {"behaviours": [{"component": "replay", "share": 0.3}]},
            r"share 0\.3 of Replay is 2\.4 of the 8 trajectories.*0, 0\.125",
        ),
        ({"behaviours": [{"component": "back_and_forth", "share": 0.1}]}, r"share 0\.1 of BackAndForth"),
        (
            {"behaviours": [{"component": "prior_buffer", "share": 0.5}, {"component": "replay", "share": 0.5}]},
            r"PriorBuffer 0\.5, Replay 0\.5 leave nothing",
        ),
        ({"behaviours": [{"component": "replay", "share": 0.5, "capacity": 0}]}, "greater than 0"),
        ({"behaviours": [{"component": "replay", "share": 1.0}]}, "less than 1"),
        ({"behaviours": [{"component": "replay"}]}, "needs 'share'"),
        ({"behaviours": [{"component": "back_and_forth", "share": 0.5, "depth": 0.0}]}, "greater than 0"),
        ({"behaviours": [{"component": "back_and_forth", "share": 0.5, "depth": 1.5}]}, "less than or equal to 1"),
        ({"behaviours": [{"component": "prior_buffer", "refresh": 100}]}, "refresh 100 is larger than the capacity 64"),
        ({"behaviours": [{"component": "replay", "share": 0.5}] * 2}, "'replay' is there more than once"),
        ({"beta": {"value": 1.0, "kl_budget": {"nats": 0.0}}}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources(run(**sections))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("behaviours=[{component: replai, share: 0.5}]", "replay"),
        ("behaviours=[{component: back_and_fort, share: 0.5}]", "back_and_forth"),
        ("behaviours=[{component: replay, share: 0.5, capasity: 9}]", "capacity"),
        ("behaviours=[{component: back_and_forth, share: 0.5, dept: 0.5}]", "depth"),
        ("behaviours=[{component: on_policy, untill: 9}]", "until"),
    ],
)
def test_an_unknown_behaviour_or_setting_names_the_nearest(key: str, meant: str, tmp_path: Path) -> None:
    open_run(run(), tmp_path / "run")
    with pytest.raises(ValueError, match=rf"Did you mean '{meant}'"):
        describe_components(load_config(tmp_path / "run", [key]))


LORA = "It has: full, rank, alpha, target_modules, seed"


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
