"""What objectives refuse, and what the trainer relies on in all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from diffusion_rtb.interfaces import Objective
from diffusion_rtb.objectives._checks import check_choice
from diffusion_rtb.objectives._log_z import VarGrad, build_log_z
from diffusion_rtb.objectives._penalty import Penalty
from diffusion_rtb.objectives.rtb import RTB, SCALES
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from tests.oracles.terms import KlReinforce, random_terms


@pytest.mark.parametrize("objective", [RTB(), TrustPCL(), TrustPCL(2)])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(objective: Objective, beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must be a positive finite number .* got {beta}"):
        objective(random_terms(0), beta)


@pytest.mark.parametrize("objective", [RTB(), TrustPCL(), TrustPCL(2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["log_q", "log_p", "reward"])
def test_values_must_be_finite(objective: Objective, name: str, value: float) -> None:
    terms = random_terms(0)
    broken = getattr(terms, name).detach().clone()
    broken[(4, 1) if broken.ndim == 2 else 4] = value
    step = r", step 1," if broken.ndim == 2 else ""
    with pytest.raises(ValueError, match=rf"{name} of trajectory 4{step} is {value} \(1 of 6 trajectories"):
        objective(replace(terms, **{name: broken}), 1.0)


@pytest.mark.parametrize("name", ["log_p", "reward", "prompt"])
def test_shapes_must_not_broadcast(name: str) -> None:
    """The tests' shape checks stand in front of it, so the field is set behind their back, as no checker would stop it."""
    terms = random_terms(0)
    object.__setattr__(terms, name, getattr(terms, name).reshape(len(terms.reward), -1)[:, :1])
    with pytest.raises(ValueError, match=rf"{name} has the shape \(6, 1\), but log_q is \(6, 4\)"):
        RTB()(terms, 1.0)


def test_shapes_of_log_q() -> None:
    terms = random_terms(0)
    object.__setattr__(terms, "log_q", terms.log_q.sum(dim=1))
    with pytest.raises(ValueError, match=r"log_q must have the shape \(batch, steps\), got \(6,\)"):
        RTB()(terms, 1.0)
    with pytest.raises(ValueError, match="at least one trajectory of one step"):
        RTB()(random_terms(0, batch=0, prompts=1), 1.0)


def test_length_must_divide_the_steps() -> None:
    objective = TrustPCL(3)
    objective.prepare(2, (2,), 3)
    with pytest.raises(ValueError, match=r"length=3 does not divide .* 4 steps .* allowed are 1, 2, 4"):
        objective(random_terms(0), 1.0)


def test_value_network_must_be_prepared() -> None:
    with pytest.raises(RuntimeError, match="call prepare"):
        TrustPCL(2)(random_terms(0), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Penalty("cubic"), "loss must be one of squared, huber, forward_kl, jeffreys, got 'cubic'"),
        (lambda: Penalty("huber", 0.0), "huber_delta must be a positive finite number .* got 0.0"),
        (lambda: Penalty(dead_zone=-0.1), "dead_zone must be a finite number >= 0 .* got -0.1"),
        (lambda: build_log_z("network", Penalty()), "log_z must be one of learned, per_prompt, vargrad, got 'network'"),
        (lambda: check_choice("scale", "dollars", SCALES), "scale must be one of nats, reward, got 'dollars'"),
        (lambda: TrustPCL(0), "length must be at least 1 step, .* got 0"),
        (lambda: TrustPCL(2, "vargrad"), "log_z='vargrad' is for whole trajectories; .* Remove log_z"),
        (lambda: TrustPCL(2, width=0), "width must be at least 1 channel, got 0"),
    ],
)
def test_arguments_are_refused_with_the_remedy(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("build", [RTB, partial(RTB, "per_prompt"), TrustPCL, partial(TrustPCL, 2), KlReinforce])
def test_all_are_objectives(build: Any) -> None:
    """What the trainer relies on: prepare, call, backward into log_q and the objective's own parameters, state_dict."""
    objective: Objective = build()
    objective.prepare(2, (2,), 3)
    terms = random_terms(0)
    answer = objective(replace(terms, **{k: getattr(terms, k).float() for k in ("x", "timesteps", "features")}), 2.0)
    answer.loss.backward()
    assert terms.log_q.grad is not None
    assert terms.log_q.grad.shape == terms.log_q.shape
    assert answer.residual.shape == answer.log_z.shape == (6,)
    assert all(isinstance(value, Tensor) for value in objective.state_dict().values())


def test_vargrad_owns_nothing() -> None:
    assert not VarGrad().state_dict()
    assert not list(RTB().parameters())
