"""Objectives of noised samples with samplers without noise: exact where the answer is known, whole runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.doctor.examinations import gradient, memory, precision, time
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.evaluation.metric import NO_NOISE
from diffusion_rtb.needs import NEEDS
from diffusion_rtb.objectives.ram import RAM
from diffusion_rtb.objectives.reward_weighted import RewardWeighted
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.images import draw_images
from diffusion_rtb.training.assemble import check_run
from diffusion_rtb.training.rounding_floor import trained_networks
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.regression import Regression
from tests.oracles.behaving import differing, gradient_of, rows, run, state
from tests.oracles.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

COVARIANCE, SLOPE, BETA = torch.tensor([[2.0, 0.6], [0.6, 0.5]]), torch.tensor([1.0, 0.5]), 0.6
PRIOR = {"component": "gaussian", "mean": [1.0, -2.0], "covariance": COVARIANCE.tolist(), "steps": 6, "eta": 0.0}
TILT = {"component": "ram", "stages": 1, "length": 4}


def ode(out: Path, objective: dict[str, Any], **sections: Any) -> Trainer:
    train = {"group": 128, "micro_batch": 128, "lr": 0.1, "checkpoint_every": 2} | sections.pop("train", {})
    return run(out, objective=objective, prior=PRIOR, beta=BETA, train=train, **sections)


def posterior_mean(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Of standardised data: the mean of N(0, C)·exp(beta·r), and C."""
    denoiser = trainer.prior.pipe.denoiser
    C = COVARIANCE / denoiser.scale**2
    return BETA * C @ (SLOPE * denoiser.scale), C


def be_the_posterior(trainer: Trainer) -> None:
    """E*[noise | x_t] - E[noise | x_t] = -a·b·(a²C + b²)^-1 m, whatever x_t is."""
    m, C = posterior_mean(trainer)
    denoiser, own = trainer.prior.pipe.denoiser, trainer.prior.parameters()
    for t in range(1, PRIOR["steps"] + 1):  # type: ignore[operator]
        a, b = denoiser.alpha_bar[t].sqrt(), (1 - denoiser.alpha_bar[t]).sqrt()
        shift = -a * b * torch.linalg.solve(a**2 * C + b**2 * torch.eye(2), m)
        own["offset"].data[t - 1] = shift / denoiser.gain[t]


def gradients(trainer: Trainer, objective: Any, *, of_posterior: bool, seeds: int) -> Tensor:
    """One row per seed, each from 512 exact samples that no sampler of ours has drawn."""
    m, C = posterior_mean(trainer)
    root, sampler = torch.linalg.cholesky(C), trainer.sampler
    chain = sampler.draw([0] * 512, list(range(512))).trajectory
    networks = dict.fromkeys(objective.compares, trainer.prior.as_prior)
    found = []
    for seed in range(seeds):
        noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(seed))
        x_0 = noise @ root.T + (m if of_posterior else 0)
        x = chain.x.clone()
        x[:, -1] = x_0
        trajectory = type(chain)(x, chain.timesteps, chain.std, chain.log_prob)
        part = Batch(trajectory, torch.zeros(512, dtype=torch.long), sampler.rewards(x_0, [0] * 512))
        Regression(sampler, objective, BETA, networks).push({"posterior": part}, None, seed)
        found.append(gradient_of(trainer.prior))
    return torch.stack(found)


@pytest.mark.parametrize(("objective", "of_posterior"), [(RAM(), True), (RAM(1, 1), False), (RewardWeighted(), False)])
def test_the_posterior_of_a_linear_reward_is_at_rest(tmp_path: Path, objective: Any, of_posterior: bool) -> None:
    """At every step of the ODE, also the last one; the prior is not."""
    trainer = ode(tmp_path, TILT)

    def off(seeds: int) -> Tensor:
        rows = gradients(trainer, objective, of_posterior=of_posterior, seeds=seeds)
        standard_errors: Tensor = rows.mean(0) / (rows.std(0) / len(rows) ** 0.5)
        return standard_errors

    assert float(off(5).abs().max()) > 8
    be_the_posterior(trainer)
    assert float(off(8).abs().max()) < 6  # Student's t of 7 degrees, 36 of them


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = ode(tmp_path_factory.mktemp("ode"), TILT | {"length": 12}, train={"iterations": 12, "lr_decay": "linear"})
    trainer.fit()
    return trainer


def test_it_draws_the_tilt_of_what_the_prior_draws(trained: Trainer) -> None:
    """x_0 of a linear map: its covariance K says how far its mean goes, beta·K·slope."""
    seeds = list(range(4000))
    prior, found = (
        trained.sampler.draw([0] * 4000, seeds, of_prior=of_prior, images=True).images for of_prior in (True, False)
    )
    assert prior is not None
    assert found is not None
    wanted = BETA * torch.cov(prior.T) @ SLOPE
    assert float((found.mean(0) - prior.mean(0) - wanted).norm()) < 0.2 * float(wanted.norm())
    target = trained.prior.exact_target(trained.sampler.reward, BETA)  # type: ignore[attr-defined]
    exact = target.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(exact.mean(0).float(), prior.mean(0) + wanted, atol=0.05, rtol=0.05)
    assert target.as_exact is None


def test_nothing_that_needs_a_density_is_logged_or_measured(trained: Trainer) -> None:
    for row in rows(trained):
        assert not {"kl", "elbo", "ess", "parity", "achieved_strength", "residual_mean", "log_z"} & row.keys()
        assert {"reward", "reward_std", "loss", "gradient_norm"} <= row.keys()
    numbers = evaluate_run(trained.folder, ["eval.samples=64", "eval.prior_samples=64", "eval.bootstrap=20"])
    why = {row["metric"]: row["why"] for row in numbers["left_out"]}
    assert {name for name, said in why.items() if said == NO_NOISE} == {
        "strength",
        "kl",
        "bill",
        "kl_profile",
        "norm_ratio",
        "elbo",
        "ess",
    }
    assert numbers["overall"]["log_z"]["from_prior"] > 0
    assert numbers["overall"]["log_z"]["from_posterior"] is None
    assert numbers["overall"]["reward"]["posterior"]["mean"] > numbers["overall"]["reward"]["prior"]["mean"]


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    vector = {"component": "value_gradient", "warm_up_updates": 5}
    kept = [
        {"component": "prior_buffer", "share": 0.25, "capacity": 32},
        {"component": "replay", "share": 0.25, "capacity": 32},
    ]
    train = {"iterations": 4, "group": 8, "micro_batch": 8}
    whole = ode(tmp_path / "whole", vector, behaviours=kept, train=train)
    whole.fit()
    ode(tmp_path / "parts", vector, behaviours=kept, train=train | {"iterations": 2}).fit()
    resumed = ode(tmp_path / "parts", vector, behaviours=kept, train=train)
    resumed.fit()
    assert differing(state(whole), state(resumed)) == []


def test_the_doctor_finds_nothing_wrong(tmp_path: Path) -> None:
    patient = Patient(ode(tmp_path, TILT).config, tmp_path / "run")
    for module in (memory, precision, gradient, time):
        assert all(finding.verdict != "stop" for finding in module.examine(patient).findings), module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def image_run(tiny: Path, out: Path, **changed: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "solver",
        "out": str(out),
        "prior": {"component": "stable_diffusion", "path": str(tiny), "steps": 5, "guidance": 1.0},
        "reward": {"component": "brightness"},
        "beta": 2.0,
        "objective": {"component": "reward_weighted"},
        "behaviours": [{"component": "on_policy", "measured": 0}],
        "prompts": {"list": ["a cat"]},
        "train": {
            "iterations": 1,
            "prompts_per_iteration": 1,
            "group": 4,
            "micro_batch": 4,
            "gradient_steps": None if changed.get("objective") == {"component": "reward_backprop"} else 2,
            "grid_every": 0,
        },
    }
    sampler = changed.pop("prior", {})
    vectors = sampler.get("component") == "gaussian"
    data["prior"] = PRIOR if vectors else data["prior"] | {"tilted_prior": "unguided"} | sampler
    data["reward"] = {"component": "density", "density": {"linear": SLOPE.tolist()}} if vectors else data["reward"]
    return RunConfig.model_validate(data | changed)


def test_an_update_costs_its_states_and_no_trajectory(tiny: Path, tmp_path: Path) -> None:
    """Two network calls for two states of a solver that remembers two answers, after the five of drawing."""
    from diffusion_rtb.training.assemble import assemble

    solver = {"scheduler": "DPMSolverMultistepScheduler", "scheduler_arguments": {"solver_order": 2}}
    trainer = assemble(image_run(tiny, tmp_path, prior=solver))
    calls: list[bool] = []
    (network,) = trained_networks(trainer.prior)
    handle = network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = {name: p.detach().clone() for name, p in trainer.prior.parameters().items()}
    trainer.fit()
    handle.remove()
    assert calls == [False] * 5 + [True] * 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.prior.parameters().items())
    assert draw_images(trainer.prior, ["a cat"], 2).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("objective", "calls_for_log"),
    [({"component": "value_gradient", "warm_up_updates": 5}, 0), ({"component": "ram"}, 4)],
)
def test_trajectories_that_nobody_reads_are_not_scored(
    objective: dict[str, Any], calls_for_log: int, tmp_path: Path
) -> None:
    """With noise: what is learned is the same to the bit, and an iteration between two measured ones makes no call for its log.

    One that learns from the states of these trajectories has log p for nothing: it asks the prior about all of them anyway.
    """
    found: dict[int, tuple[dict[str, Tensor], list[int]]] = {}
    for every in (1, 2):
        train = {"iterations": 4, "group": 8, "micro_batch": 8, "measure_every": every}
        trainer = run(tmp_path / str(every), objective=objective, beta=BETA, train=train)
        calls: list[int] = []
        (network,) = trained_networks(trainer.prior)
        handle = network.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        trainer.fit()
        handle.remove()
        found[every] = state(trainer), calls
        logged = ["kl" in row for row in rows(trainer)]
        assert logged == ([True] * 4 if every == 1 else [True, False, True, False])
    # log p of two iterations; log q came with the drawing
    assert len(found[1][1]) - len(found[2][1]) == 2 * calls_for_log
    assert differing(found[1][0], found[2][0]) == []


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"component": "rtb"}}, "rtb learns from their densities"),
    ({"beta": {"value": 1.0, "kl_budget": {"nats": 1.0}}}, "kl_budget follows their KL"),
    ({"behaviours": [{"component": "replay", "share": 0.5}]}, "replay keeps them"),
]


@pytest.mark.parametrize(("changed", "why"), UNREAD)
def test_what_reads_them_is_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"objective": {"component": "diffusion_dpo"}, "train": {"measure_every": 2}}
    given |= changed
    with pytest.raises(ValueError, match=why):
        run(tmp_path, **given)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"component": "rtb"}}, NEEDS["noise"].objective),
    ({"objective": {"component": "reward_backprop"}}, NEEDS["noise"].objective),
    (
        {"objective": {"component": "adjoint_matching"}, "reward": {"component": "colour", "colour": "red"}},
        NEEDS["noise"].objective,
    ),
    ({"behaviours": [{"component": "back_and_forth", "share": 0.5}]}, NEEDS["noise"].behaviour),
    ({"behaviours": [{"component": "steered", "share": 0.5, "particles": 4}]}, NEEDS["noise"].behaviour),
    ({"behaviours": [{"component": "replay", "share": 0.5, "priority": "importance"}]}, NEEDS["noise"].behaviour),
    ({"behaviours": [{"component": "on_policy", "exploration": 0.5}]}, NEEDS["noise"].behaviour),
    ({"beta": {"value": 1.0, "kl_budget": {"nats": 1.0}}}, "set beta.kl_budget to null"),
    ({"watch": {}}, "set watch to null"),
]


@pytest.mark.parametrize(
    ("changed", "remedy", "sampler"),
    [
        *[(changed, remedy, PRIOR) for changed, remedy in REFUSED],
        (*REFUSED[0], {"scheduler": "EulerDiscreteScheduler"}),
    ],
)
def test_what_reads_densities_is_refused_before_weights_load(
    tiny: Path, tmp_path: Path, sampler: dict[str, Any], changed: dict[str, Any], remedy: str
) -> None:
    objective = {"component": "diffusion_dpo"} if "behaviours" in changed else {"component": "reward_weighted"}
    given = {"objective": objective, "behaviours": []} | changed
    with pytest.raises(ValueError, match=r"no density") as refused:
        check_run(image_run(tiny, tmp_path, prior=sampler, **given), tmp_path / "solver")
    assert remedy in str(refused.value)
    check_run(image_run(tiny, tmp_path, prior=sampler, objective=objective, behaviours=[]), tmp_path / "solver")
