"""What is logged is of the posterior itself, prompt by prompt, whatever it is trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.training.metrics import Measured, posterior_metrics
from pipelines._analytic.linear_gaussian import kl
from tests.oracles.behaving import BETA, LINEAR, begin_at_the_posterior, known, run


def test_prompts_with_other_normalisers_do_not_look_like_a_bad_posterior() -> None:
    """At the exact posterior of every prompt log w is log Z of its prompt: ESS 1, ELBO the mean log Z."""
    log_z = torch.tensor([-1.0, -3.0, -6.0, -2.0], dtype=torch.float64)
    prompt = torch.arange(4).repeat_interleave(8)
    reward = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_ratio = (BETA * reward - log_z[prompt])[:, None] * torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = posterior_metrics(Measured(prompt, reward, log_ratio), BETA)
    assert found["ess"] == pytest.approx(1.0)
    assert found["elbo"] == pytest.approx(float(log_z.mean()))
    assert found["kl"] == pytest.approx(BETA * float(reward.mean()) - float(log_z.mean()))
    assert found["kl_peak_step"] == 1
    assert found["kl_peak_share"] == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["relative", "added"])
def test_under_exploration_the_posterior_is_measured_and_not_what_explores(kind: str, tmp_path: Path) -> None:
    """At the posterior of a linear reward, known in closed form: ELBO = log Z and KL = beta²·v/2 whatever the noise."""
    exploration = [{"component": "on_policy", "exploration": 1.0, "until": 10, "kind": kind, "measured": 1.0}]
    sizes = {"group": 400, "micro_batch": 400}
    trainer = run(tmp_path, prior={"dtype": "float64"}, behaviours=exploration, train=sizes)
    begin_at_the_posterior(trainer)
    tilt = known(trainer)
    nats = float(kl(tilt.best, tilt.p).sum())
    found = trainer.step()
    assert found["elbo"] == pytest.approx(tilt.best_elbo, abs=1e-3)  # every log w is log Z
    assert found["ess"] == pytest.approx(1.0, abs=1e-4)
    assert found["kl"] == pytest.approx(nats, abs=5 * math.sqrt(2 * nats / 400))
    assert found["beta"] * found["reward"] - found["kl"] == pytest.approx(found["elbo"], abs=1e-6)


def test_without_exploration_nothing_more_is_drawn(tmp_path: Path) -> None:
    counts = []
    explored = {"none": {}, "over": {"exploration": 1.0}, "on": {"exploration": 1.0, "until": 9}}
    for name, exploration in explored.items():
        trainer = run(tmp_path / name, behaviours=[{"component": "on_policy", **exploration}])
        trainer.iteration = 1
        reward = trainer.sampler.reward
        drawn: list[int] = []

        def counted(images: Any, prompts: Any, reward: Any = reward, drawn: list[int] = drawn) -> Any:
            drawn.append(len(images))
            return reward(images, prompts)

        trainer.sampler.reward = counted
        trainer.step()
        counts.append(sum(drawn))
    assert counts == [8, 8, 8 + 2]  # a quarter of the group


def test_what_is_measured_is_not_trained_on(tmp_path: Path) -> None:
    gradients = []
    for measured in (0.0, 0.25, 1.0):
        exploration = [{"component": "on_policy", "exploration": 1.0, "until": 9, "measured": measured}]
        trainer = run(tmp_path / str(measured), behaviours=exploration, reward=LINEAR)
        found = trainer.step()
        gradients.append(found["gradient_norm"])
        assert ("elbo" in found) is (measured > 0)
        assert ("reward" in found) is (measured > 0)
    assert gradients[0] == gradients[1] == gradients[2]


def test_a_budget_needs_something_to_measure(tmp_path: Path) -> None:
    unfit = [{"component": "on_policy", "exploration": 1.0, "until": 9, "measured": 0.0}]
    with pytest.raises(ValueError, match=r"measured 0 of on_policy leaves beta\.kl_budget without a KL"):
        run(tmp_path, behaviours=unfit, beta={"value": 1.0, "kl_budget": {"nats": 1.0}})
