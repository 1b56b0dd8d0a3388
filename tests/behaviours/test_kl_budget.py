"""beta finds the number of nats it is given, and is part of the state of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rtb.beta import KlBudget
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.training.metrics import Measured, realised
from pipelines._analytic.linear_gaussian import kl
from tests.oracles.behaving import BETA, LINEAR, QUADRATIC, begin_at_the_posterior, differing, known, rows, run, state

NATS, RATE = 1.5, 0.1


def after(beta: float, kl: float, covariance: float, variance: float, pace: float = 1.0) -> float:
    """log of the factor on beta."""
    budget = KlBudget(beta, nats=NATS, rate=RATE)
    budget.settle(torch.tensor([kl, covariance, variance], dtype=torch.float64), pace)
    return math.log(budget.beta / beta)


@pytest.mark.parametrize(
    ("beta", "kl", "covariance", "variance", "expected"),
    [
        (2.0, 1.5, 8.0, 4.0, 0.0),  # there
        (2.0, 0.0, 8.0, 4.0, RATE),  # q has realised beta = 2 and is nowhere: full speed
        (2.0, 0.75, 8.0, 4.0, RATE / 2),
        (2.0, 0.75, 4.0, 4.0, RATE / 4),  # q has realised half of beta
        (2.0, 0.75, 40.0, 4.0, RATE / 2),  # more than beta is no reason to go faster
        (2.0, 0.0, -1.0, 4.0, 0.0),
        (2.0, 0.0, 0.0, 0.0, 0.0),  # every reward the same
        (2.0, 2.25, 8.0, 4.0, -RATE / 2),
        (2.0, 90.0, 8.0, 4.0, -RATE),
        (2.0, 90.0, 16.0, 4.0, -RATE / 2),  # q is still coming down from beta = 4
        (2.0, 90.0, 0.0, 0.0, -RATE),
    ],
)
def test_beta_moves_by_the_relative_error(
    beta: float, kl: float, covariance: float, variance: float, expected: float
) -> None:
    assert after(beta, kl, covariance, variance) == pytest.approx(expected, abs=1e-12)
    assert after(beta, kl, covariance, variance, pace=0.25) == pytest.approx(expected / 4, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5, 50), st.floats(-10, 10), st.floats(0, 10))
def test_beta_moves_towards_the_budget_and_never_far(
    beta: float, kl: float, covariance: float, variance: float
) -> None:
    moved = after(beta, kl, covariance, variance)
    assert abs(moved) <= RATE + 1e-12
    assert moved * (NATS - kl) >= 0


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_posterior_says_its_own_beta(tmp_path: Path) -> None:
    trainer = run(tmp_path, prior={"dtype": "float64"}, train={"group": 2000, "micro_batch": 2000})
    begin_at_the_posterior(trainer)
    drawn = trainer.sampler.completed(trainer.sampler.draw([0] * 4000, range(4000)))
    found, covariance, variance = realised(Measured.of(drawn)).tolist()
    # log q - log p = beta·r - log F(x_T): a signal of 1e-4 in x_T, and rewards in float32.
    assert covariance / variance == pytest.approx(BETA, rel=1e-4)
    tilt = known(trainer)
    expected = float(kl(tilt.best, tilt.p).sum())
    # log q - log p = beta·r - log Z has the variance 2·KL for a linear reward.
    assert found == pytest.approx(expected, abs=5 * math.sqrt(2 * expected / 4000))


def test_moments_are_taken_within_prompts(tmp_path: Path) -> None:
    """A prompt whose rewards and log-ratios lie elsewhere (another Z) does not look like a slope."""
    trainer = run(tmp_path, prior={"dtype": "float64"})
    begin_at_the_posterior(trainer)
    drawn = trainer.sampler.completed(trainer.sampler.draw([0] * 64, range(64)))
    assert drawn.log_q is not None
    second = torch.arange(64) >= 32
    shift = torch.where(second, -7.0, 0.0)[:, None]
    shifted = replace(drawn, prompt=second.long(), reward=drawn.reward + 5 * second, log_q=drawn.log_q + shift)
    moments, plain = (realised(Measured.of(d)) for d in (shifted, replace(drawn, prompt=second.long())))
    assert float(moments[1] / moments[2]) == pytest.approx(BETA, rel=1e-3)
    assert float(moments[0]) == pytest.approx(float(plain[0]) - 7 * 4 / 2, rel=1e-9)


@pytest.mark.parametrize(("reward", "start", "nats"), [(LINEAR, 0.3, 1.5), (LINEAR, 2.5, 1.5), (QUADRATIC, 0.7, 0.7)])
@pytest.mark.usefixtures("shapes_unchecked")
def test_the_budget_is_reached(reward: dict[str, Any], start: float, nats: float, tmp_path: Path) -> None:
    """KL(q || p) of the trained chain is computed in closed form.

    The measured KL of 200 trajectories has a standard error of sqrt(2·1.5/200) = 0.12 nats; the sum over some twenty iterations,
    which is what beta moves by, leaves a third of it, and the noise of the gradient as much again: 10 % are two standard errors.
    """
    sizes = {"iterations": 110, "group": 200, "micro_batch": 200}
    trainer = run(tmp_path, reward=reward, beta={"value": start, "kl_budget": {"nats": nats}}, train=sizes)
    trainer.fit()
    q, tilt = trainer.prior.chain(), known(trainer, trainer.beta)  # type: ignore[attr-defined]
    assert float(kl(q, tilt.p).sum()) == pytest.approx(nats, rel=0.1)
    assert tilt.elbo(q) == pytest.approx(tilt.best_elbo, abs=0.05)
    if reward is LINEAR:  # KL = beta²·v/2
        v = 2 * float(kl(tilt.best, tilt.p).sum()) / trainer.beta**2
        assert trainer.beta == pytest.approx(math.sqrt(2 * nats / v), rel=0.05)
    assert open_trained_run(trainer.folder).progress.beta == trainer.beta


@pytest.mark.parametrize(("start", "most"), [(1.0, 8.0), (0.1, 8.0), (20.0, 80.0)])
def test_a_posterior_that_goes_no_further_is_waited_for(
    start: float, most: float, caplog: pytest.LogCaptureFixture
) -> None:
    """q follows beta up to 2, where KL = b²·v/2 is 2 of the 5 nats asked for, with v = 1 and a lag of 10 iterations."""
    budget, b = KlBudget(start, nats=5.0, rate=0.05), 0.0
    for _ in range(4000):
        b += (min(budget.beta, 2.0) - b) / 10
        budget.settle(torch.tensor([b**2 / 2, b, 1.0], dtype=torch.float64), 1.0)
    assert budget.beta <= most * math.exp(0.05)
    if start < 20:
        assert budget.beta >= most / math.exp(0.05)
        assert len(caplog.records) == 1, "said once"
        assert "KL is 2 of the 5 nats" in caplog.text
        assert "realised a beta of 2:" in caplog.text
    # Once it can follow again, beta goes on, and finds the five nats.
    for _ in range(2000):
        b += (budget.beta - b) / 10
        budget.settle(torch.tensor([b**2 / 2, b, 1.0], dtype=torch.float64), 1.0)
    assert budget.beta == pytest.approx(math.sqrt(10), rel=1e-3)


@pytest.mark.usefixtures("shapes_unchecked")
def test_more_nats_than_a_chain_can_be_from_its_prior(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reward has a maximum and the steps a fixed variance: however large beta, KL stays where that mean is reached."""
    sizes = {"iterations": 120, "group": 32, "micro_batch": 32}
    budget = {"value": BETA, "kl_budget": {"nats": 500.0, "rate": 0.5}}
    trainer = run(tmp_path, reward=QUADRATIC, beta=budget, train=sizes)
    trainer.fit()
    assert trainer.beta < 200  # 0.5 of log beta per iteration would be e^60
    last = rows(trainer)[-1]
    assert last["kl"] < 500
    assert last["beta_realised"] <= last["beta"]
    assert "beta.kl_budget: beta stays at" in caplog.text


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_resumed_run_goes_on_with_the_same_beta(tmp_path: Path) -> None:
    budget = {"value": BETA, "kl_budget": {"nats": NATS, "rate": 0.3}}
    whole = run(tmp_path / "whole", beta=budget, train={"iterations": 6})
    whole.fit()
    run(tmp_path / "parts", beta=budget, train={"iterations": 3}).fit()
    parts = run(tmp_path / "parts", beta=budget, train={"iterations": 6})
    parts.fit()
    assert rows(parts) == rows(whole)
    assert differing(state(parts), state(whole)) == []
    assert len({row["beta"] for row in rows(whole)}) >= 3


def test_without_a_budget_beta_is_the_configs(tmp_path: Path) -> None:
    trainer = run(tmp_path, train={"iterations": 2})
    trainer.fit()
    assert [row["beta"] for row in rows(trainer)] == [BETA, BETA]
    assert open_trained_run(trainer.folder).progress.beta == BETA
