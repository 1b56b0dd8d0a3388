"""Achieved strength: 1 with r² 1 where the posterior is exact, the share where it is that of another beta, and its interval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.comparison.truths.measure import of_trajectories
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.estimates import achieved_strength, strength_error, tilt_moments
from diffusion_rtb.evaluation.metrics.achieved_strength import AchievedStrength, strength_interval
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.training.metrics import Measured, posterior_metrics, realised
from pipelines.gmm import GMM
from tests.oracles.behaving import BETA, begin_at_the_posterior, known, run

CONFIG = EvalConfig(bootstrap=200)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(ratio: Tensor, reward: Tensor, prompt: Tensor) -> Drawn:
    return Drawn(prompt, reward, ratio[:, None], torch.zeros(len(ratio), 1))


@pytest.mark.parametrize("share", [0.65, 1.0, 1.5])
def test_a_gaussian_posterior_of_another_beta_has_its_share(share: float, tmp_path: Path) -> None:
    """The chain's own posterior of share·beta, exact for a linear reward; what is left is the signal of x_T, 1e-4."""
    trainer = run(tmp_path, prior={"dtype": "float64"}, train={"group": 64, "micro_batch": 64})
    trainer.prior.set_posterior(known(trainer, share * BETA).best)  # type: ignore[attr-defined]
    found = trainer.step()
    assert found["achieved_strength"] == pytest.approx(share, abs=1e-3)
    assert found["strength_r2"] == pytest.approx(1.0, abs=1e-3)


def test_training_and_evaluation_say_the_same(tmp_path: Path) -> None:
    trainer = run(tmp_path, train={"group": 16, "micro_batch": 16})
    begin_at_the_posterior(trainer)
    own = trainer.sampler.completed(trainer.sampler.draw([0] * 16, list(range(16))))
    measured = Measured.of(own)
    logged = posterior_metrics(measured, BETA)
    shown = AchievedStrength().of(Drawn.of_batch(own), Drawn.of_batch(own), BETA, CONFIG)
    assert shown["slope"]["mean"] == pytest.approx(logged["achieved_strength"], rel=1e-6)
    assert shown["r2"] == pytest.approx(logged["strength_r2"], rel=1e-6)
    _, covariance, variance = realised(measured).tolist()
    assert shown["beta_achieved"] == pytest.approx(covariance / variance, rel=1e-6)


def test_through_a_chain_of_few_steps_the_truth_has_slope_1_and_an_r2_that_grows_with_them() -> None:
    """The exact denoiser of the 25 modes. In T steps of fixed variance no chain is the posterior: v, the variance that is left in
    log q - log p - r, falls as 1/T and has nothing to do with r, so the slope stays 1 within its error sqrt(v / (n·Var r)), and
    r² = 1 / (1 + v / Var r). With 1,500 samples: 0.39 of 40 steps, 0.59 of 80, 0.78 of 160.
    """
    count, noise = 600, []
    for steps in (40, 160):
        made = GMM(steps=steps)
        posterior = made.posterior()
        with made.as_exact(posterior):
            drawn = rollout(made, [""] * count, range(count))
        with made.as_prior():
            ratio = (drawn.log_prob - score(made, [""] * count, drawn)).sum(1)
        x = made.decode(drawn.x_0).double()
        reward = posterior.log_prob(x) - made.mixture.log_prob(x)
        slope, r2 = achieved_strength(ratio, reward, 1.0, torch.zeros(count, dtype=torch.long))
        noise.append((1 - r2) / r2)
        assert slope == pytest.approx(1.0, abs=4 * math.sqrt(noise[-1] / count))
    assert noise[1] < 0.5
    assert noise[0] / noise[1] == pytest.approx(4, rel=0.6)


def test_it_is_the_regression_of_numpy_on_centred_numbers() -> None:
    prompt = torch.arange(3).repeat_interleave(20)
    reward = normal(60) + 5.0 * prompt
    ratio = 0.6 * 2.0 * reward + 0.5 * normal(60, 1) - 30.0 * prompt
    slope, r2 = achieved_strength(ratio, reward, 2.0, prompt)
    x, y = ((v.reshape(3, 20) - v.reshape(3, 20).mean(1, keepdim=True)).flatten().numpy() for v in (2 * reward, ratio))
    assert slope == pytest.approx(np.polyfit(x, y, 1)[0])
    assert r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    # Across prompts the same numbers would say something else.
    assert abs(achieved_strength(ratio, reward, 2.0, torch.zeros_like(prompt))[0] - slope) > 1
    assert tilt_moments(ratio, reward, prompt)[0] == pytest.approx(float(ratio.mean()))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    prompt, hits = torch.arange(2).repeat_interleave(40), 0
    for seed in range(150):
        reward = normal(80, 2 * seed) + prompt
        ratio = 0.7 * reward + normal(80, 2 * seed + 1)
        slope, _ = achieved_strength(ratio, reward, 1.0, prompt)
        found = strength_interval(slope, ratio, 1.0, reward, prompt, 0.9, 200)
        hits += found.low <= 0.7 <= found.high
    # 150 trials of 0.9 have a standard deviation of 3.7; the percentile bootstrap of a slope is 2 % short at n = 80.
    assert 118 <= hits <= 146


def test_what_moved_without_the_reward_lowers_r2_and_not_the_slope() -> None:
    prompt, reward = torch.zeros(4000, dtype=torch.long), normal(4000)
    slope, r2 = achieved_strength(2 * reward + 2 * normal(4000, 1), reward, 2.0, prompt)
    assert slope == pytest.approx(1.0, abs=4 / math.sqrt(4000))
    assert r2 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("rewards", "prompts", "why"),
    [
        ([0.1, 0.1, 0.1, 0.7, 0.7, 0.7], [0, 0, 0, 1, 1, 1], "the rewards of a prompt's samples are all the same"),
        ([0.1, 0.7], [0, 1], "one sample per prompt has nothing to be compared with"),
    ],
)
def test_without_different_rewards_it_says_why(rewards: list[float], prompts: list[int], why: str) -> None:
    reward, prompt = torch.tensor(rewards), torch.tensor(prompts)
    posterior = side(normal(len(rewards)), reward, prompt)
    found = AchievedStrength().of(posterior, posterior, 1.0, CONFIG)
    assert (found["slope"], found["r2"]) == (None, None)
    assert why in AchievedStrength().sentence(found, 1.0)
    assert AchievedStrength().row(found) == ("-",)
    logged = posterior_metrics(Measured(prompt, reward.double(), torch.zeros(len(rewards), 2)), 1.0)
    assert not {"achieved_strength", "strength_r2"} & logged.keys()


def test_an_untrained_posterior_has_none() -> None:
    reward, prompt = normal(8), torch.zeros(8, dtype=torch.long)
    slope, r2 = achieved_strength(torch.zeros(8), reward, 1.0, prompt)
    assert slope == 0.0
    assert math.isnan(r2)


def test_the_sentence_says_what_was_asked_and_what_came() -> None:
    reward, prompt = normal(50), torch.zeros(50, dtype=torch.long)
    posterior = side(1.3 * reward, reward, prompt)
    found = AchievedStrength().of(posterior, posterior, 2.0, CONFIG)
    text = AchievedStrength().sentence(found, 2.0)
    assert text.startswith("Asked for beta 2, got 1.3 [1.3, 1.3], a strength of 0.65; 0% of what the chain moved")


def test_the_error_is_that_of_least_squares() -> None:
    """Against numpy's own covariance of a straight line, one prompt; and against draws."""
    reward, prompt, beta = normal(40), torch.zeros(40, dtype=torch.long), 1.7
    ratio = 2 * reward + normal(40, 1)
    _, covariance = np.polyfit((beta * reward).numpy(), ratio.numpy(), 1, cov=True)
    assert strength_error(ratio, reward, beta, prompt) == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-6)
    slopes = [achieved_strength(2 * reward + normal(40, seed), reward, beta, prompt)[0] for seed in range(2, 402)]
    assert float(np.std(slopes)) == pytest.approx(1 / (beta * float(reward.std(correction=0)) * 40**0.5), rel=0.15)


def test_rewards_that_are_nearly_equal_make_no_number() -> None:
    """A classifier that is sure of all samples: a slope of any size, with the noise of log q - log p over next to no spread."""
    reward, prompt = 1 - 1e-3 * normal(64).abs(), torch.zeros(64, dtype=torch.long)
    ratio = normal(64, 1)
    slope, error = achieved_strength(ratio, reward, 2.0, prompt)[0], strength_error(ratio, reward, 2.0, prompt)
    assert abs(slope) > 10
    assert error > abs(slope) / 4
    posterior = side(ratio, reward, prompt)
    found = AchievedStrength().of(posterior, posterior, 2.0, CONFIG)
    assert found["slope"] is None
    assert "does not tell none of the tilt from all of it" in AchievedStrength().sentence(found, 2.0)
    assert of_trajectories(posterior, 2.0)["strength"] is None
    logged = posterior_metrics(Measured(prompt, reward.double(), ratio[:, None].double()), 2.0)
    assert logged["achieved_strength"] == pytest.approx(slope, rel=1e-4)  # as before, with its error beside it
    assert logged["strength_error"] == pytest.approx(error, rel=1e-4)
