"""What a method needs and a run lacks is refused before anything loads, with the nearest one, which fits there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_rtb.behaviours._mixture import sources
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.yaml_text import read_yaml
from diffusion_rtb.needs import NEEDS
from diffusion_rtb.steering import Aim
from diffusion_rtb.steering._opening import open_steerable
from diffusion_rtb.training.assemble import check_run
from diffusion_rtb.training.compatibility import check_owner, check_reward_memory, check_settings
from tests.oracles.behaving import QUADRATIC

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

BUFFER: dict[str, Any] = {"component": "prior_buffer", "share": 0.5}
LINEAR: dict[str, Any] = {"component": "density", "density": QUADRATIC}
MOVING: dict[str, Any] = {"component": "standardise", "samples": None, "reward": LINEAR}
ANNEALED: dict[str, Any] = {"value": 1.0, "anneal": {"start": 0.5, "iterations": 3}}
KEEPS_V: list[dict[str, Any]] = [
    {"component": "value_gradient"},
    {"component": "trust_pcl", "length": 1, "value_loss": "none", "warm_up_updates": 5},
]


def named(*names: str) -> list[dict[str, Any]]:
    return [{"component": name} for name in names]


def config(objective: dict[str, Any], **lacking: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "needs",
        "prior": {"component": "gaussian", "mean": [1.0, -2.0], "steps": 4},
        "reward": LINEAR,
        "beta": 1.0,
        "prompts": {"list": [""]},
        "objective": objective,
        "train": {"prompts_per_iteration": 1, "group": 4, "micro_batch": 4},
    }
    for key, value in lacking.items():
        data[key] = data[key] | value if key == "train" else value
    return RunConfig.model_validate(data)


OFF_POLICY: list[dict[str, Any]] = [
    BUFFER,
    {"component": "replay", "share": 0.5},
    {"component": "back_and_forth", "share": 0.5},
    {"component": "steered", "share": 0.5, "particles": 4},
    {"component": "on_policy", "exploration": 0.5},
]
CHOSEN: list[dict[str, Any]] = [
    {**BUFFER, "resample": True},
    {"component": "back_and_forth", "share": 0.5},
    {"component": "steered", "share": 0.5, "particles": 4},
    {"component": "replay", "share": 0.5, "priority": "reward"},
]
WEIGHED: list[dict[str, Any]] = [
    {"component": "reinforce_kl", "importance": "exact"},
    {"component": "trust_pcl", "length": 1, "value_loss": "returns"},
]
POLICY = (
    "reinforce_kl",
    "reinforce_naive",
    "grpo",
    "dpok",
    "ddpo",
    "reward_backprop",
    "reward_weighted",
)
OBJECTIVES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("gradient", named("reward_backprop", "adjoint_matching"), {"reward": {"component": "jpeg"}}),
    (
        "decoder",
        named("reward_backprop", "adjoint_matching"),
        {"prior": {"component": "tests.oracles.third_party_prior:WalkPrior"}},
    ),
    *[("own", named(*POLICY), {"behaviours": [other]}) for other in OFF_POLICY],
    *[("own", [{"component": "adjoint_matching", "adjoint": "full"}], {"behaviours": [other]}) for other in OFF_POLICY],
    *[("own", named("adjoint_matching"), {"behaviours": [OFF_POLICY[i]]}) for i in (1, 2, 4)],
    *[("density", WEIGHED, {"behaviours": [other]}) for other in CHOSEN],
    ("newest", named("reinforce_kl", "reinforce_naive", "reward_backprop"), {"train": {"updates_per_iteration": 2}}),
    (
        "group",
        named(
            "rtb",
            "trust_pcl",
            "dpo",
            "reinforce_kl",
            "grpo",
            "ddpo",
            "reinforce_naive",
            "value_gradient",
            "reward_weighted",
            "diffusion_dpo",
        ),
        {"train": {"group": 1, "micro_batch": 1}},
    ),
    ("samples", [{"component": "value_gradient", "from_samples": 0.5}], {}),
    ("beta", KEEPS_V, {"beta": ANNEALED}),
]
PAIRS = [(need, objective, lacking) for need, objectives, lacking in OBJECTIVES for objective in objectives]


@pytest.mark.parametrize(
    ("need", "objective", "lacking"), PAIRS, ids=[f"{need}-{objective['component']}" for need, objective, _ in PAIRS]
)
def test_an_objective_is_refused_with_one_that_fits(
    need: str, objective: dict[str, Any], lacking: dict[str, Any], tmp_path: Path
) -> None:
    nearest = NEEDS[need].objective
    check = partial(check_run, folder=tmp_path) if need in ("gradient", "decoder") else settled
    with pytest.raises(ValueError, match=r"The nearest that does without: objective: ") as refused:
        check(config(objective, **lacking))
    assert str(refused.value).endswith(f"objective: {nearest}.")
    check(config(component(nearest), **lacking))
    assert not list(tmp_path.iterdir())


def settled(config: RunConfig) -> None:
    """What `check_run` asks of settings, without a prior."""
    check_settings(config, build(config.objective, "objective"), sources(config))


def component(text: str) -> dict[str, Any]:
    found = read_yaml(text)
    return found if isinstance(found, dict) else {"component": found}


@pytest.mark.parametrize("objective", KEEPS_V)
def test_a_moving_reward_is_refused_beside_a_value_that_stays(objective: dict[str, Any]) -> None:
    reward = build(MOVING, "reward")
    with pytest.raises(ValueError, match=rf"keeps its V.*: objective: {NEEDS['reward'].objective}\.$"):
        check_reward_memory(reward, build(objective, "objective"), sources(config(objective)))
    nearest = component(NEEDS["reward"].objective)
    check_reward_memory(reward, build(nearest, "objective"), sources(config(nearest)))


def test_what_an_objective_owns_is_refused_in_several_processes() -> None:
    with pytest.raises(ValueError, match=rf"parameters of its own.*: objective: {NEEDS['process'].objective}\.$"):
        check_owner(build({"component": "rtb", "log_z": "learned"}, "objective"), True, 2)
    nearest = build(component(NEEDS["process"].objective), "objective")
    assert not nearest.state_dict()


CONFIG = Path("configs/gaussian.yaml")


@pytest.mark.parametrize(
    ("need", "method"),
    [
        ("posterior", {"component": "rlg"}),
        ("value", {"component": "value_guidance"}),
        *[("value", {"component": name, "value": value}) for name in ("smc", "svdd") for value in ("learned", "both")],
    ],
)
def test_steering_is_refused_with_one_that_fits(need: str, method: dict[str, Any]) -> None:
    nearest = NEEDS[need].steering
    with pytest.raises(ValueError, match=rf"The nearest that does without: steering: {nearest}\.$"):
        open_steerable(CONFIG, "latest", describe(method, "steering").build())
    open_steerable(CONFIG, "latest", describe({"component": nearest}, "steering").build())


class Strange(DDIMScheduler):  # type: ignore[misc]
    """Nobody knows what its network predicts."""


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior whose scheduler is of no known prediction, before its weights load."""
    from pipelines.gaussian import Gaussian

    scheduler = Strange(prediction_type="of its own")
    monkeypatch.setattr(Gaussian, "known_sampler", property(lambda self: scheduler))


@pytest.mark.parametrize("method", ["smc", "svdd"])
def test_an_unknown_estimate_is_refused_before_weights_load(strange: None, method: str) -> None:
    nearest = NEEDS["estimate"].steering
    with pytest.raises(ValueError, match=rf"weighs states by r\(x0_hat\).*: steering: {nearest}\.$"):
        open_steerable(CONFIG, "latest", describe({"component": method}, "steering").build())
    open_steerable(CONFIG, "latest", describe({"component": nearest}, "steering").build())


def test_noised_samples_need_the_estimate_too(strange: None, tmp_path: Path) -> None:
    nearest = NEEDS["estimate"].objective
    with pytest.raises(ValueError, match=rf"of its own.*The nearest that does without: objective: {nearest}\.$"):
        check_run(config({"component": "reward_weighted"}), tmp_path)
    check_run(config(component(nearest)), tmp_path)


def test_steered_trajectories_need_the_estimate_too(strange: None, tmp_path: Path) -> None:
    steered = {"component": "steered", "share": 0.5, "particles": 4}
    with pytest.raises(
        ValueError, match=r"of its own.*The nearest that does without: behaviour: \{component: prior_buffer"
    ):
        check_run(config({"component": "rtb"}, behaviours=[steered]), tmp_path)
    check_run(config({"component": "rtb"}, behaviours=[component(NEEDS["estimate"].behaviour)]), tmp_path)


def walk(method: str) -> Callable[[], object]:
    """One step of a chain without noise."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    steering = describe({"component": method}, "steering").build()
    particles = max(steering.particles, 2)

    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = scheduler  # type: ignore[attr-defined]

    def go() -> object:
        with steering.around(pipe, Aim(lambda x: x.flatten(1).sum(1), beta=1.0)):
            x = torch.randn(particles, 3)
            for t in scheduler.timesteps:
                x = scheduler.step(0 * x, t, x, eta=0.0).prev_sample
        return x

    return go


@pytest.mark.parametrize("method", ["smc", "svdd"])
def test_a_chain_without_noise_is_refused_at_its_first_step(method: str) -> None:
    nearest = NEEDS["noise"].steering
    with pytest.raises(ValueError, match=rf"pass eta=1.0.*The nearest that does without: steering: {nearest}\.$"):
        walk(method)()
    walk(nearest)()


def test_solvers_of_several_steps_are_refused_before_weights_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    from pipelines.gaussian import Gaussian

    scheduler = DPMSolverMultistepScheduler(solver_order=2)
    monkeypatch.setattr(Gaussian, "known_sampler", property(lambda self: scheduler))
    with pytest.raises(ValueError, match="solver_order=2 combines several network outputs"):
        check_run(config({"component": "rtb"}), tmp_path)


def test_the_page_has_every_row_of_the_table() -> None:
    page = Path("docs/which-method.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    for need in NEEDS.values():
        names = [component(text)["component"] for text in (need.objective, need.behaviour, need.steering) if text]
        mine = [row[-1] for row in rows if need.what in row[0]]
        assert len(mine) == 1, need
        assert all(f"`{name}`" in mine[0] for name in names), need
