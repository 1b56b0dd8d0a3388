"""Back and forth: the forward chain has the scheduler's own joint law, the rest is the posterior's, and all of it is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from diffusion_rtb.behaviours._memory import rank_weights
from diffusion_rtb.behaviours.back_and_forth import BackAndForth
from diffusion_rtb.chain.continuation import Continuation, continued
from diffusion_rtb.chain.forward_process import noised, noised_chain, signal_and_noise
from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.chain.seeds import generators
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from pipelines.gaussian import Gaussian
from tests.oracles.behaving import BETA, QUADRATIC, begin_at_the_posterior, known, rows, run
from tests.oracles.pixel import PixelPrior
from tests.training.test_trainer import prior_folder as prior_folder
from tests.training.test_trainer import run_config

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler(),
    "ddpm": DDPMScheduler(),
    "euler": EulerAncestralDiscreteScheduler(),
    "dpm": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


def prepared(name: str, steps: int = 7) -> Any:
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_forward_chain_has_the_joint_law_of_the_forward_process(name: str) -> None:
    """It is linear in x_0 and noise, so unit vectors give its mean and covariance exactly.

    E[x_t | x_0] = a_t·x_0 and Cov(x_t, x_s | x_0) = (a_t / a_s)·b_s² for the less noisy s, a and b by the scheduler's `add_noise`.
    """
    scheduler = prepared(name)
    timesteps = scheduler.timesteps.double()
    n = len(timesteps)
    a, b = signal_and_noise(scheduler, timesteps)
    zero = torch.zeros(n, n, 1, dtype=torch.float64)
    mean = noised_chain(scheduler, torch.ones(1, 1, dtype=torch.float64), timesteps, zero[:1])[0, :, 0]
    torch.testing.assert_close(mean, a)
    answers = noised_chain(scheduler, zero[:, 0], timesteps, torch.eye(n, dtype=torch.float64)[:, :, None])[:, :, 0]
    covariance = answers.T @ answers
    expected = torch.zeros(n, n, dtype=torch.float64)
    for t in range(n):
        for s in range(t, n):
            expected[t, s] = expected[s, t] = (a[t] / a[s] if t < s else 1.0) * b[s] ** 2
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_signal_and_noise_are_what_the_scheduler_adds(name: str) -> None:
    scheduler = prepared(name)
    timesteps = scheduler.timesteps.float()
    x_0 = torch.randn(len(timesteps), 3)
    found = noised(scheduler, x_0, timesteps, torch.Generator().manual_seed(5))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5))
    a, b = signal_and_noise(scheduler, timesteps)
    torch.testing.assert_close(a[:, None].float() * x_0 + b[:, None].float() * noise, found, rtol=1e-5, atol=1e-5)


def test_it_is_the_priors_chain_run_backwards() -> None:
    """Many steps, exact denoiser, eta 1: covariances of neighbouring states agree with those of the denoising chain."""
    prior = Gaussian([0.0], 1.0, steps=100, dtype="float64")
    p = prior.chain()
    scheduler = prior.pipe.scheduler
    scheduler.set_timesteps(100)
    a, b = signal_and_noise(scheduler, scheduler.timesteps.double())
    _, covs = p.marginals
    var = covs[:-1, 0, 0]
    torch.testing.assert_close(var, a**2 + b**2, rtol=0.06, atol=0)  # 100 steps leave 5 % of the variance out
    backward = (covs[:-2] @ p.A[:-1].mT)[:, 0, 0]  # Cov(x_t, x_s), x_s after x_t
    forward = a[:-1] / a[1:] * (a**2 + b**2)[1:]
    torch.testing.assert_close(backward, forward, rtol=0.06, atol=0)


def test_a_scheduler_without_a_forward_process_is_refused() -> None:
    class Bare:
        timesteps = torch.tensor([3.0, 2.0])

    with pytest.raises(ValueError, match="Bare has neither add_noise nor scale_noise"):
        noised_chain(Bare(), torch.zeros(1, 2), Bare.timesteps, torch.zeros(1, 2, 2))


def test_a_process_that_gives_signal_back_is_refused() -> None:
    class Odd:
        def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            return x * (0.1 * t[:, None]) + noise

    with pytest.raises(ValueError, match=r"Odd keeps 0\.4 of x_0 at a noisier timestep than where it keeps 0\.2"):
        noised_chain(Odd(), torch.zeros(1, 2), torch.tensor([4.0, 2.0]), torch.zeros(1, 2, 2))


def priors() -> dict[str, Prior]:
    gaussian = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=6)
    ddpm = Gaussian([1.0, -2.0], steps=6, scheduler="DDPMScheduler")
    return {"latents": gaussian, "ddpm": ddpm, "no_latents": PixelPrior(5)}


@pytest.mark.parametrize("known_states", [1, 3, 5])
@pytest.mark.parametrize("name", ["latents", "no_latents"])
def test_continuing_a_rollout_from_its_own_states_is_the_rollout(name: str, known_states: int) -> None:
    """The same generators: the sampled rest is the same to the last bit."""
    prior, prompts, seeds = priors()[name], [""] * 4, [11, 12, 13, 14]
    whole = rollout(prior, prompts, seeds)
    again = continued(prior, prompts, seeds, whole.x[:, :known_states])
    assert torch.equal(again.x, whole.x)
    assert torch.equal(again.log_prob, whole.log_prob)
    assert again.log_behaviour is not None
    assert bool(again.log_behaviour.isnan().all())


@pytest.mark.parametrize("name", ["latents", "ddpm", "no_latents"])
def test_given_states_are_kept_and_scored_and_the_rest_is_sampled(name: str) -> None:
    prior = priors()[name]
    steps = 6 if name != "no_latents" else 5
    states = torch.randn(64, 3, *prior.dims, generator=torch.Generator().manual_seed(1))
    found = continued(prior, [""] * 64, range(64), states)
    assert torch.equal(found.x[:, :3], states)
    assert found.steps == steps
    assert torch.equal(score(prior, [""] * 64, found), found.log_prob)
    # Standardised noise of the sampled steps, from their own log-densities: log N = -1/2 |z|² + const, E|z|² = dims.
    dims = float(states[0, 0].numel())
    dense = found.stochastic.clone()
    dense[:2] = False
    const = dims * (0.5 * torch.log(torch.tensor(2 * torch.pi)) + found.std[dense].double().log())
    squares = -2 * (found.log_prob[:, dense] + const)
    error = (2 * dims / squares.numel()) ** 0.5
    assert float(squares.mean()) == pytest.approx(dims, abs=5 * error)


def source(trainer: Trainer) -> BackAndForth:
    found = trainer.sources["back_and_forth"][0]
    assert isinstance(found, BackAndForth)
    return found


@pytest.mark.parametrize(("depth", "sampled"), [(0.25, 1), (0.5, 2), (0.1, 1), (1.0, 4)])
def test_a_trajectory_is_noised_from_a_good_sample_and_ends_in_a_new_one(
    depth: float, sampled: int, tmp_path: Path
) -> None:
    trainer = run(tmp_path, behaviours=[{"component": "back_and_forth", "share": 0.5, "depth": depth}])
    begin_at_the_posterior(trainer)
    sampler, back = trainer.sampler, source(trainer)
    first = back.draw(sampler, [0], 4, 0, BETA)
    assert first.log_q is not None, "nothing is stored yet: trajectories of the posterior"
    assert first.trajectory.log_behaviour is None
    back.settle({"posterior": sampler.completed(sampler.draw([0] * 16, range(16)))})
    drawn = sampler.completed(back.draw(sampler, [0], 4, 1, BETA))
    x, pool = drawn.trajectory.x, back.memory[0][0]
    timesteps = drawn.trajectory.timesteps
    known_states = 4 - sampled + 1
    # The noised states less their share of noise: what is left of x_0 is a stored sample, as the same seeds show.
    again = back.draw(sampler, [0], 4, 1, BETA)
    assert torch.equal(again.trajectory.x, x), "a draw is repeatable"
    good = back._good(0, 0, 4, 1)
    assert all(any(torch.equal(g, stored) for stored in pool) for g in good)
    other = back._noised(sampler, torch.zeros_like(good), seeds_of(back, 1, 4))
    a, _ = signal_and_noise(trainer.prior.pipe.scheduler, timesteps[:known_states])
    left = x[:, :known_states] - other
    torch.testing.assert_close(left, a.float()[None, :, None] * good[:, None], rtol=1e-4, atol=1e-5)
    reward = trainer.sampler.reward(trainer.prior.decode(drawn.trajectory.x_0), [""] * 4)
    torch.testing.assert_close(drawn.reward, reward.float())
    with trainer.prior.as_prior():
        log_p = score(trainer.prior, [""] * 4, drawn.trajectory)
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    assert torch.equal(drawn.log_p, log_p)
    # The posterior is exact: log Z + log q - log p = beta·r on any trajectory, however it came about.
    residual = known(trainer).log_z + (drawn.log_q - drawn.log_p).sum(1) - BETA * drawn.reward
    assert float(residual.abs().max()) < 2e-3  # the chain is memoryless up to a signal of 1e-4; float32 network


def seeds_of(back: BackAndForth, iteration: int, count: int) -> list[int]:
    from diffusion_rtb.chain.seeds import seed_of

    return [seed_of(back.seed, "back", iteration, 0, 0, k) for k in range(count)]


def test_the_pool_holds_the_last_samples_of_each_prompt_and_prefers_the_good(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        prompts={"list": ["a", "b"]},
        behaviours=[{"component": "back_and_forth", "share": 0.5, "pool": 10}],
        train={"prompts_per_iteration": 2, "micro_batch": 16, "iterations": 3},
    )
    trainer.fit()
    back = source(trainer)
    for row in (0, 1):
        x_0, reward = back.memory[row]
        assert x_0.shape == (10, 2)
        torch.testing.assert_close(trainer.sampler.reward(trainer.prior.decode(x_0), []).float(), reward)
    _, reward = back.memory[0]
    draws = torch.cat([back._good(0, 0, 8, iteration) for iteration in range(500)])
    shares = torch.stack([(draws == x).all(1).double().mean() for x in back.memory[0][0]])
    expected = rank_weights(reward) / rank_weights(reward).sum()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)  # 4,000 systematic draws


def test_it_finds_its_way_back_to_samples_that_the_posterior_has_left(tmp_path: Path) -> None:
    """With half of the chain kept, new samples are near the good ones and far from the posterior's own."""
    trainer = run(tmp_path, behaviours=[{"component": "back_and_forth", "share": 0.5, "depth": 0.25}])
    back, sampler = source(trainer), trainer.sampler
    own = sampler.completed(sampler.draw([0] * 64, range(64)))
    back.settle({"posterior": own})
    back.memory[0] = (torch.full((1, 2), 4.0), torch.zeros(1))
    x_0 = back.draw(sampler, [0], 64, 1, BETA).trajectory.x_0
    assert float((x_0 - 4).norm(dim=1).mean()) < 0.5 * float((own.trajectory.x_0 - 4).norm(dim=1).mean())


@pytest.mark.usefixtures("shapes_unchecked")
def test_on_a_stable_diffusion_pipeline_its_trajectories_replay_exactly(prior_folder: Path, tmp_path: Path) -> None:
    behaviour = [
        {"component": "prior_buffer", "share": 0.25},
        {"component": "replay", "share": 0.25},
        {"component": "back_and_forth", "share": 0.25},
    ]
    trainer = assemble(run_config(prior_folder, tmp_path, behaviours=behaviour, train={"iterations": 2}))
    trainer.fit()
    found = rows(trainer)
    assert all(row["parity"] == 0.0 for row in found)
    assert all({"replay_share_reward", "back_and_forth_share_reward"} <= row.keys() for row in found)
    row = next(iter(source(trainer).memory))
    drawn = trainer.sampler.completed(source(trainer).draw(trainer.sampler, [row], 4, 3, 0.5))
    assert drawn.log_q is not None
    again = score(trainer.prior, trainer.sampler.texts([row] * 4), drawn.trajectory)
    assert torch.equal(again, drawn.log_q)


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_best_chain_of_a_quadratic_reward_is_found_from_noised_samples(tmp_path: Path) -> None:
    """Three quarters of each batch are not the posterior's own. No chain of these variances has a higher ELBO than the best."""
    sizes = {"iterations": 100, "group": 64, "micro_batch": 64, "lr_decay": "cosine"}
    behaviour = [{"component": "back_and_forth", "share": 0.75, "depth": 0.5}]
    trainer = run(tmp_path, reward=QUADRATIC, beta=1.0, behaviours=behaviour, train=sizes)
    trainer.fit()
    tilt = known(trainer)
    assert tilt.elbo(trainer.prior.chain()) == pytest.approx(tilt.best_elbo, abs=0.05)  # type: ignore[attr-defined]


def test_a_pipeline_that_starts_elsewhere_cannot_be_continued(tmp_path: Path) -> None:
    """Otherwise the first transition would be scored from a state that nobody gave."""
    trainer = run(tmp_path)
    prior = trainer.prior
    states = rollout(prior, [""] * 3, range(3)).x[:, :2]
    pipe: Any = prior.pipe
    original = pipe._start
    pipe._start = lambda *args: 1.5 * original(*args)
    recorder = Continuation(pipe.scheduler, states, generators=generators(range(3)))
    with recorder, pytest.raises(ValueError, match="did not start at the given states"):
        pipe(**prior.arguments([""] * 3), generator=generators(range(3)))
