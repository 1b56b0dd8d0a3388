"""Means aimed along the gradient of the soft value, against chains whose posterior is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.chain.forward_process import noised, signal_and_noise
from diffusion_rtb.comparison.cost import Meter
from diffusion_rtb.interfaces import States, Terms
from diffusion_rtb.objectives import _value_fit
from diffusion_rtb.objectives._bounded_value import BoundedValue
from diffusion_rtb.objectives._value import Block
from diffusion_rtb.objectives.value_gradient import ValueGradient
from diffusion_rtb.training.schedules import dealt
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.regression import Regression
from pipelines._analytic.linear_gaussian import Quadratic
from tests.oracles.behaving import QUADRATIC, gradient_of, known, rows, run
from tests.oracles.states import states_of

BUFFER: dict[str, Any] = {"component": "prior_buffer", "share": 0.875, "capacity": 512, "noised": True}


class Exact(torch.nn.Module):
    """log F of a state in closed form."""

    def __init__(self, log_f: Quadratic) -> None:
        super().__init__()
        self.quadratic = log_f

    def log_f(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        values: Tensor = self.quadratic(x_t.double())
        return values


def test_with_the_exact_value_the_means_of_the_posterior_aim_at_themselves(tmp_path: Path) -> None:
    """The best chain of fixed deviations is where nothing pulls any more, at every step and every state."""
    trainer = run(tmp_path, reward=QUADRATIC)
    tilt = known(trainer)
    x = torch.randn(1, tilt.p.steps + 1, 2, dtype=torch.float64)
    mean_q, mean_p = tilt.best.means(x), tilt.p.means(x)
    objective = ValueGradient()
    for i in tilt.p.stochastic.tolist()[:-1]:
        std = float(tilt.p.C[i, 0, 0].sqrt())
        objective.value = Exact(tilt.log_f[i + 1])  # type: ignore[assignment]
        aims = objective.aim(states_of(mean_q[:, i].expand(4000, 2), mean_p[:, i].expand(4000, 2), std=std), 1.3)
        error = aims.std(0) / 4000**0.5
        assert bool(((aims.mean(0) - mean_q[0, i]).abs() < 4 * error).all())
        assert float((mean_q - mean_p)[0, i].norm()) > 20 * float(error.norm())  # it would be seen to miss


def test_scale_multiplies_the_shift_of_both_targets() -> None:
    q, p, zero = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)
    pull = Exact(Quadratic(torch.zeros(2, 2).double(), torch.tensor([1.0, -2.0]).double(), torch.zeros(()).double()))
    slope = torch.autograd.functional.jacobian(lambda x: pull.log_f(x, x, x).sum(), q)
    for scale in (1.0, 1.5):
        objective = ValueGradient(scale=scale, from_samples=0.6)
        objective.value = pull  # type: ignore[assignment]
        torch.testing.assert_close(objective.aim(states_of(q, p), 1.0), (p + scale * 0.49 * slope).to(q))
        torch.testing.assert_close(objective.aim(states_of(q, p, mean_0=zero), 1.0), p + scale * (zero - p))
        late = objective.aim(states_of(q, p, mean_0=zero, share=0.6), 1.0)
        torch.testing.assert_close(late, (p + scale * 0.49 * slope).to(q))


def linear_rewards(n: int) -> Terms:
    """x_0 ~ N(0, 1), r = 0.8·x_0, in 1 dimension."""
    x = torch.randn(n, 1, 1, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(n, 4)
    return Terms(
        log_q=zero.clone().requires_grad_(),
        log_p=zero,
        reward=0.8 * x[:, 0, 0],
        prompt=torch.zeros(n, dtype=torch.long),
        x=x,
        timesteps=torch.tensor([999.0, 700.0, 400.0, 100.0]),
        features=torch.zeros(n, 0),
    )


def test_the_bounded_value_is_the_soft_value_of_noised_states() -> None:
    """x_0 given x_t = a·x_0 + b·z is N(a·x_t, b²) for a standard normal: V(x_t) = 0.8·a·x_t + beta·(0.8·b)²/2."""
    chain, beta = DDPMScheduler(), 1.5
    terms = linear_rewards(8000)
    torch.manual_seed(0)
    value = BoundedValue((1,), 0, width=32)
    value.fit(terms, beta, lambda x, t, g: noised(chain, x, t, g), 800, 3e-3)
    x = torch.linspace(-1.2, 1.2, 25)[:, None]
    for t in terms.timesteps[1:].tolist():
        a, b = (float(level) for level in signal_and_noise(chain, torch.tensor([t])))
        found = value(x, torch.full((25,), t), torch.zeros(25, 0))
        expected = 0.8 * a * x[:, 0] + beta * (0.8 * b) ** 2 / 2
        assert float((found - expected).abs().mean()) < 0.08
    clean = value(x, torch.zeros(25), torch.zeros(25, 0))
    assert float((clean - 0.8 * x[:, 0]).abs().mean()) < 0.08
    assert not any(parameter.requires_grad for parameter in value.parameters())


def test_pictures_go_through_the_value_in_pieces_of_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = linear_rewards(40)
    terms = replace(
        terms, x=terms.x[..., None, None].expand(-1, -1, -1, 6, 6) * torch.linspace(0.5, 1.5, 36).reshape(6, 6)
    )
    chain, found = DDPMScheduler(), []
    for at_once in (_value_fit.AT_ONCE, 36 * 100):
        monkeypatch.setattr(_value_fit, "AT_ONCE", at_once)
        torch.manual_seed(0)
        value = BoundedValue((1, 6, 6), 0, width=4).double()
        value.fit(terms, 1.5, lambda x, t, g: noised(chain, x, t, g), 3, 3e-3)
        found.append(torch.cat([parameter.flatten() for parameter in value.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@given(dense=st.integers(1, 30), count=st.integers(1, 30), batches=st.integers(1, 9), seed=st.integers(0, 99))
def test_steps_are_dealt_evenly(dense: int, count: int, batches: int, seed: int) -> None:
    steps = dealt(range(dense), count, batches, seed)
    assert all(len(set(mine)) == len(mine) == min(count, dense) for mine in steps)
    often = [sum(mine.count(step) for mine in steps) for step in range(dense)]
    assert max(often) - min(often) <= 1


def test_any_step_is_dealt_as_often_as_any_other() -> None:
    came = torch.zeros(7)
    for seed in range(2000):
        for mine in dealt(range(7), 3, 2, seed):
            came[mine] += 1
    assert float((came / 2000 - 6 / 7).abs().max()) < 0.04


def regressing(out: Path, train: dict[str, Any] | None = None, steps: int = 4, **objective: Any) -> Trainer:
    settings = {"component": "value_gradient", "width": 16, "warm_up_updates": 300} | objective
    sizes = {"group": 64, "micro_batch": 16} | (train or {})
    return run(out, reward=QUADRATIC, objective=settings, behaviours=[BUFFER], train=sizes, prior={"steps": steps})


class Fixed:
    """Aims at numbers of its own."""

    def aim(self, at: States, beta: float) -> Tensor:
        return at.means["prior"] + torch.tensor([0.3, -0.2]) * (at.step + 1)


def test_the_gradient_is_that_of_the_loss(tmp_path: Path) -> None:
    """Against differences of the loss itself along a random direction, over all steps of own and noised states."""
    trainer = regressing(tmp_path, from_samples=1.0, warm_up_updates=0)
    parts = trainer.sources.draw(trainer.sampler, [0], 0, 1.3)
    regression = Regression(trainer.sampler, Fixed(), 1.3, {"prior": trainer.prior.as_prior})
    parameters = list(trainer.prior.parameters().values())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    regression.push(parts, None, 0)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    found = []
    for h in (1e-2, -1e-2):
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.add_(along, alpha=h)
        found.append(regression.push(parts, None, 0))
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.sub_(along, alpha=h)
    assert slope == pytest.approx((found[0] - found[1]) / 2e-2, rel=1e-3)
    some = [regression.push(parts, 1, seed) for seed in range(20)]
    assert sum(some) / 20 == pytest.approx(regression.push(parts, None, 0), rel=0.1)


@pytest.mark.parametrize("from_samples", [0.0, 1.0])
def test_the_best_chain_is_learned(from_samples: float, tmp_path: Path, shapes_unchecked: None) -> None:
    """From noised samples, with 20 steps: with 4 the forward process is not what the chain reverses, and 0.6 nats are missing."""
    iterations = 10 if from_samples == 1 else 6
    sizes = {"iterations": iterations, "updates_per_iteration": 4, "lr_decay": "linear", "micro_batch": 64}
    updates = 0 if from_samples == 1 else 300
    sizes |= {"group": 128, "micro_batch": 128, "lr": 0.02} if from_samples == 1 else {}
    trainer = regressing(tmp_path, sizes, 20, from_samples=from_samples, warm_up_updates=updates)
    trainer.fit()
    batch = trainer.sampler.completed(trainer.sampler.draw([0] * 512, list(range(512))))
    assert batch.log_q is not None
    assert batch.log_p is not None
    elbo = 1.3 * batch.reward - (batch.log_q - batch.log_p).sum(1)
    error = float(elbo.std() / 512**0.5)
    assert float(elbo.mean()) > known(trainer).best_elbo - 0.06 - 3 * error
    assert float(elbo.mean()) < known(trainer).best_elbo + 3 * error


def test_the_prior_is_asked_once_about_the_states_of_its_own_chain(tmp_path: Path, shapes_unchecked: None) -> None:
    """Several updates on the same trajectories: its means there come with the density that the log needs, and are the same."""
    trainer = regressing(tmp_path, {"group": 16, "updates_per_iteration": 3, "micro_batch": 8}, warm_up_updates=5)
    trainer._begin()
    drawn = trainer.sources.draw(trainer.sampler, [0], 0, 1.3)
    first, found = trainer.updates.gradient(drawn, 1.3, 0, 0), []
    for parts in (drawn, first.parts):
        meter = Meter(trainer.sampler)
        meter.go(memory=False)
        trainer.updates.gradient(parts, 1.3, 0, 1)
        meter.stop()
        found.append((meter.spent["network_calls"], gradient_of(trainer.prior)))
    (calls, gradient), (fewer, same) = found
    assert calls - fewer == 4 * len(drawn["posterior"])
    assert torch.equal(gradient, same)


def test_a_single_trajectory_of_the_posterior_is_learned_from_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shapes_unchecked: None
) -> None:
    """What RTB would say for the log needs two of a prompt; states need nobody beside them."""
    behaviours = [BUFFER | {"capacity": 64}]
    alone, pair = (
        run(
            tmp_path / str(group),
            reward=QUADRATIC,
            objective={"component": "value_gradient", "width": 16, "warm_up_updates": 5},
            behaviours=behaviours,
            train={"group": group, "micro_batch": 8, "iterations": 2},
        )
        for group in (8, 16)
    )
    alone.fit()
    pair.fit()
    first, compared = (rows(trainer)[0] for trainer in (alone, pair))
    assert {"log_z", "residual_std", "reward_std"} <= compared.keys() - first.keys()
    assert {"loss", "gradient_norm", "reward", "elbo", "kl"} <= first.keys()
    assert all(isfinite(value) for value in first.values())
    assert "tells no sample from another" not in capsys.readouterr().err


def test_noised_samples_end_where_the_prior_did(tmp_path: Path) -> None:
    trainer = regressing(tmp_path)
    source, count = trainer.sources.prior
    first = source.draw(trainer.sampler, [0], count, 0, 1.3)
    again = source.draw(trainer.sampler, [0], count, 0, 1.3)
    later = source.draw(trainer.sampler, [0], count, 1, 1.3)
    assert torch.equal(first.trajectory.x, again.trajectory.x)
    assert not torch.equal(first.trajectory.x[:, 0], later.trajectory.x[:, 0])
    assert first.log_p is None
    held = source.extended[0][0]
    assert held.trajectory.x.shape == (512, 1, 2)
    ends = {tuple(x) for x in held.trajectory.x_0.tolist()}
    assert all(tuple(x) in ends for x in first.trajectory.x_0.tolist())
    a, b = signal_and_noise(trainer.prior.pipe.scheduler, first.trajectory.timesteps)
    many = source.draw(trainer.sampler, [0], 4096, 2, 1.3).trajectory
    for i in range(4):
        noise = (many.x[:, i] - a[i] * many.x_0) / b[i]
        assert float(noise.mean(0).abs().max()) < 5 / 64
        assert float((noise.std(0) - 1).abs().max()) < 5 / 64 / 2**0.5


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_goes_on_from_its_checkpoint(rounds: int, tmp_path: Path, shapes_unchecked: None) -> None:
    few: dict[str, Any] = {"warm_up_updates": 5, "rounds": rounds, "walks": 16}
    whole = regressing(tmp_path / "whole", **few)
    whole.fit()
    regressing(tmp_path / "part", {"iterations": 2}, **few).fit()
    after = regressing(tmp_path / "part", **few)
    after.fit()
    for name, parameter in whole.prior.parameters().items():
        assert torch.equal(parameter, after.prior.parameters()[name])
    for name, tensor in whole.objective.state_dict().items():
        assert torch.equal(tensor, after.objective.state_dict()[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warm_up_updates": 0}, "leaves V untrained"),
        ({"from_samples": 1.5}, "a share of the steps, 0 to 1; got 1.5"),
        ({"scale": 0.0}, "scale must be a positive finite number, got 0.0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"blocks": -1}, "blocks must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueGradient(**arguments)


def test_its_value_has_the_blocks_that_were_asked_for() -> None:
    objective = ValueGradient(blocks=3)
    objective.prepare(1, (4, 8, 8), 6)
    assert objective.value is not None
    assert sum(isinstance(layer, Block) for layer in objective.value.logit.layers) == 3


def test_samples_as_targets_need_a_behaviour_that_has_them(tmp_path: Path) -> None:
    objective = {"component": "value_gradient", "from_samples": 0.5}
    for behaviours in ([], [BUFFER | {"noised": False}], [BUFFER | {"resample": False}]):
        with pytest.raises(ValueError, match="no behaviour draws them noised: add"):
            run(tmp_path, objective=objective, behaviours=behaviours)


def test_beta_may_move_where_there_is_no_value(tmp_path: Path) -> None:
    annealed = {"value": 1.0, "anneal": {"start": 0.5, "iterations": 3}}
    with pytest.raises(ValueError, match="learns V once, for one beta"):
        run(tmp_path, objective={"component": "value_gradient"}, behaviours=[BUFFER], beta=annealed)
    alone = {"component": "value_gradient", "from_samples": 1.0, "warm_up_updates": 0}
    trainer = run(tmp_path, objective=alone, behaviours=[BUFFER], beta=annealed)
    assert trainer.objective.value is None  # type: ignore[attr-defined]
