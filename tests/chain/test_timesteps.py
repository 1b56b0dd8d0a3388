"""A chain on timesteps of one's own: the transitions are those of the DDPM posterior between them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from diffusion_rtb.chain.rollout import replay, rollout, score
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny

TIMESTEPS = [990, 930, 800, 400, 90]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    folder: Path = save_tiny(tmp_path_factory.mktemp("tiny"))
    return StableDiffusion(str(folder), device="cpu", scheduler="DDPMScheduler", timesteps=TIMESTEPS)


def test_the_transitions_are_those_of_the_ddpm_posterior(prior: StableDiffusion) -> None:
    trajectory = rollout(prior, PROMPTS, [1, 2])
    assert trajectory.timesteps.tolist() == TIMESTEPS
    assert trajectory.stochastic.tolist() == [True] * 4 + [False]  # the last one goes to x_0 without noise
    alpha_bar = prior.pipe.scheduler.alphas_cumprod.double()
    hidden = prior.arguments(PROMPTS)["prompt_embeds"]
    for i, (t, s) in enumerate(pairwise(TIMESTEPS)):
        a, b = alpha_bar[t], alpha_bar[s]
        x_t, x_s = trajectory.x[:, i], trajectory.x[:, i + 1]
        with torch.no_grad():
            noise = prior.pipe.unet(x_t, t, encoder_hidden_states=hidden).sample.double()
        x_0 = (x_t - (1 - a).sqrt() * noise) / a.sqrt()
        step = a / b
        # Ho et al. 2020, equation 7, with alpha_t = a / b.
        mean = b.sqrt() * (1 - step) / (1 - a) * x_0 + step.sqrt() * (1 - b) / (1 - a) * x_t
        std = ((1 - b) / (1 - a) * (1 - step)).sqrt()
        assert float(trajectory.std[i]) == pytest.approx(float(std), rel=1e-5)
        expected = Normal(mean, std).log_prob(x_s.double()).flatten(1).sum(1)
        torch.testing.assert_close(trajectory.log_prob[:, i], expected, rtol=1e-5, atol=2e-3)


def test_replay_equals_the_recording_for_all_and_for_some_steps(prior: StableDiffusion) -> None:
    trajectory = rollout(prior, PROMPTS, [1, 2])
    assert torch.equal(score(prior, PROMPTS, trajectory), trajectory.log_prob)
    some = replay(prior.pipe, trajectory, steps=[1, 3], dtype=torch.float64, **prior.arguments(PROMPTS))
    assert torch.equal(some[:, [1, 3]], trajectory.log_prob[:, [1, 3]])
    assert some[:, [0, 2, 4]].abs().max() == 0


def test_the_timesteps_belong_to_the_fingerprint(prior: StableDiffusion) -> None:
    sampler = prior.fingerprint()["sampler"]
    assert sampler["timesteps"] == TIMESTEPS
    assert sampler["steps"] == len(TIMESTEPS)
    assert f"timesteps={TIMESTEPS}" in prior.snippet()
