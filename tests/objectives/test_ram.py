"""RAM and tilt matching by quadrature over x_0 given x_t, where every posterior on the way is a normal of known moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion_rtb.chain.forward_process import knowing, signal_and_noise
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.interfaces import Samples
from diffusion_rtb.objectives.ram import RAM
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import begin_at_the_posterior, differing, run, state
from tests.oracles.states import states_of

BETA, STEP, X_T = 1.3, 2, 0.8
NODES, SHARES = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(24))
SHARES = SHARES / SHARES.sum()
UNSEEN = [{"component": "on_policy", "measured": 0}]


def moments(a: float, linear: float, curvature: float, v: float, m: float) -> tuple[float, float]:
    """Mean and variance of N(m, v)·exp(a·beta·(linear·x - curvature·x²/2)) / Z."""
    precision = 1 / v + a * BETA * curvature
    return (m / v + a * BETA * linear) / precision, 1 / precision


def expected_aim(objective: RAM, a: float, linear: float, curvature: float) -> tuple[Tensor, Callable[[float], Tensor]]:
    """E[aim | x_t] over x_0 of the a-th posterior of a standard normal, which q is; and the step to any x0_hat."""
    chain = DDPMScheduler(clip_sample=False)
    chain.set_timesteps(5)
    signal, noise = (float(level[STEP]) for level in signal_and_noise(chain, chain.timesteps.float()))

    def mean(x_0: Tensor) -> Tensor:
        x_t = torch.full((len(x_0), 1), X_T, dtype=torch.float64)
        call = StepCall(
            chain, chain.step, knowing("epsilon", x_0[:, None], x_t, signal, noise), chain.timesteps[STEP], x_t
        )
        return previous_sample(call.mean())

    v = noise**2 / (signal**2 + noise**2)
    m = v * signal / noise**2 * X_T
    centre, variance = moments(a, linear, curvature, v, m)
    x_0 = centre + variance**0.5 * NODES
    tilt = BETA * (linear * x_0 - curvature * x_0**2 / 2) / (objective.stages or 1)
    mean_q = mean(torch.full_like(x_0, centre))
    at = states_of(mean_q, mean(torch.full_like(x_0, m)), mean_old=mean_q, mean_0=mean(x_0), weight=tilt)
    aim = (SHARES[:, None] * objective.aim(at, BETA)).sum()
    expected_aim.given = v, m  # type: ignore[attr-defined]
    return aim, lambda end: mean(torch.full((1,), end, dtype=torch.float64))[0, 0]


def test_ram_is_at_rest_at_the_posterior_of_a_linear_reward() -> None:
    aim, step = expected_aim(RAM(), 1.0, 0.7, 0.0)
    v, m = expected_aim.given  # type: ignore[attr-defined]
    posterior = step(moments(1.0, 0.7, 0.0, v, m)[0])
    torch.testing.assert_close(aim, posterior, atol=1e-6, rtol=0)
    assert float((posterior - step(m)).abs()) > 0.01


@pytest.mark.parametrize("curvature", [0.5, 2.0])
def test_a_quadratic_reward_pulls_it_outwards_by_so_much(curvature: float) -> None:
    """(u / (1 + u))² of the prior's x0_hat, u = beta·c·v."""
    aim, step = expected_aim(RAM(), 1.0, 0.0, curvature)
    v, m = expected_aim.given  # type: ignore[attr-defined]
    u = BETA * curvature * v
    posterior = moments(1.0, 0.0, curvature, v, m)[0]
    torch.testing.assert_close(aim, step(posterior + (u / (1 + u)) ** 2 * m), atol=1e-6, rtol=0)


def test_tilt_matching_is_exact_in_the_limit() -> None:
    """Each stage misses the next posterior by h²·u²/(1 + h·u) of its own x0_hat: halved stages, halved errors of all together."""
    totals = []
    for stages in (1, 2, 4, 8, 16):
        total, h = 0.0, 1 / stages
        for k in range(stages):
            aim, step = expected_aim(RAM(stages, 1), k * h, 0.0, 2.0)
            v, m = expected_aim.given  # type: ignore[attr-defined]
            (here, variance), (following, _) = (moments(a, 0.0, 2.0, v, m) for a in (k * h, (k + 1) * h))
            u = BETA * 2.0 * variance
            torch.testing.assert_close(aim, step(following - here * (h * u) ** 2 / (1 + h * u)), atol=1e-6, rtol=0)
            total += float((aim - step(following)).abs())
        totals.append(total)
    assert totals[-1] < 0.1 * totals[0]
    assert totals[-1] / totals[-2] == pytest.approx(0.5, abs=0.05)


def test_a_linear_reward_needs_one_stage() -> None:
    aim, step = expected_aim(RAM(1, 1), 0.0, 0.7, 0.0)
    v, m = expected_aim.given  # type: ignore[attr-defined]
    torch.testing.assert_close(aim, step(moments(1.0, 0.7, 0.0, v, m)[0]), atol=1e-6, rtol=0)


def test_rewards_are_held_against_those_of_the_others() -> None:
    """beta·(r - mean of the others), by stage; without stages no lower than the fixed point bears."""
    samples = Samples(torch.tensor([0, 1, 0, 1, 0]), torch.tensor([1.0, 0.1, 4.0, 0.2, 1.0]))
    expected = torch.tensor([-1.5, -0.1, 3.0, 0.1, -1.5], dtype=torch.float64) * 2
    torch.testing.assert_close(RAM(4, 1).weights(samples, 2.0), expected / 4)
    raised = torch.tensor([2.5, 0.0, 2.5, 0.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(RAM().weights(samples, 2.0), expected + raised)


def matching(out: Path, iterations: int = 4, **objective: Any) -> Trainer:
    train = {"iterations": iterations, "group": 64, "micro_batch": 64}
    return run(out, objective={"component": "ram", **objective}, train=train)


def test_it_learns_a_linear_reward(tmp_path: Path, shapes_unchecked: None) -> None:
    """From the prior's mean reward to the posterior's, in one stage of a chain of a few steps."""
    train = {
        "group": 128,
        "micro_batch": 128,
        "lr": 0.1,
        "lr_decay": "linear",
        "iterations": 12,
        "updates_per_iteration": 3,
    }
    objective = {"component": "ram", "stages": 1, "length": 12}
    trainer = run(tmp_path, objective=objective, train=train, beta=0.6, behaviours=UNSEEN)
    trainer.fit()
    seeds = list(range(1000))
    found = float(trainer.sampler.draw([0] * 1000, seeds).reward.mean())
    prior = float(trainer.sampler.draw([0] * 1000, seeds, of_prior=True).reward.mean())
    begin_at_the_posterior(trainer)
    posterior = float(trainer.sampler.draw([0] * 1000, seeds).reward.mean())
    assert abs(found - posterior) < 0.25 * (posterior - prior)


def test_each_stage_begins_where_the_last_one_ended(tmp_path: Path, shapes_unchecked: None) -> None:
    trainer = matching(tmp_path / "whole", 5, stages=2, length=2)
    seen = []
    after = trainer.updates.settle

    def settle(iteration: int) -> None:
        after(iteration)
        assert trainer.updates.old is not None
        moved = {name: tensor.clone() for name, tensor in trainer.updates.old.held.items()}
        seen.append((moved, {name: p.detach().clone() for name, p in trainer.prior.parameters().items()}))

    object.__setattr__(trainer.updates, "settle", settle)
    trainer.fit()
    old, new = zip(*seen, strict=True)
    assert not any(tensor.any() for tensor in old[0].values())  # the prior
    for later in old[1:]:
        assert all(torch.equal(later[name], tensor) for name, tensor in new[1].items())
    matching(tmp_path / "part", 4, stages=2, length=2).fit()
    again = matching(tmp_path / "part", 5, stages=2, length=2)
    again.fit()
    assert differing(state(trainer), state(again)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 2}, "got stages=2, length=None"),
        ({"stages": 0, "length": 1}, "stages must be at least 1, got 0"),
        ({"stages": 3, "length": 2}, "3 stages of 2 iterations are 6, and train.iterations is 4"),
    ],
)
def test_stages_that_do_not_fit_are_refused(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        matching(tmp_path, **arguments)
