"""Weighted denoising of samples, in one round and in many, with the Wasserstein term and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion_rtb.chain.forward_process import knowing, network_predicts, signal_and_noise
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.interfaces import Samples
from diffusion_rtb.objectives.orw_cfm_w2 import OrwCfmW2
from diffusion_rtb.objectives.reward_weighted import RewardWeighted
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import begin_at_the_posterior, differing, rows, run, state
from tests.oracles.states import states_of

CHAINS = {
    "epsilon": lambda: DDPMScheduler(clip_sample=False),
    "v_prediction": lambda: DDPMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "sample": lambda: DDPMScheduler(clip_sample=False, prediction_type="sample"),
    "velocity": lambda: FlowMatchSDEScheduler(),
}


@pytest.mark.parametrize("predicts", CHAINS)
def test_the_pull_is_the_gradient_of_the_published_loss(predicts: str) -> None:
    """w·|answer - answer_0|² + w2·|answer - answer_p|² in the answers of a network, at each step up to one positive factor."""
    chain = CHAINS[predicts]()
    chain.set_timesteps(5)
    assert network_predicts(chain) == predicts
    a, b = (level.tolist() for level in signal_and_noise(chain, chain.timesteps.float()))
    x_0, x_t, answer, prior = torch.randn(4, 6, 3, dtype=torch.float64)
    w = torch.rand(6, dtype=torch.float64)
    for i in (1, 3):
        exact = knowing(predicts, x_0, x_t, a[i], b[i])

        def mean(given: torch.Tensor, i: int = i) -> torch.Tensor:
            call = StepCall(chain, chain.step, given, chain.timesteps[i], x_t)
            chain._step_index = i
            return previous_sample(call.mean())

        out = answer.clone().requires_grad_()
        loss = (w[:, None] * (out - exact) ** 2).sum() + 0.3 * ((out - prior) ** 2).sum()
        (wanted,) = torch.autograd.grad(loss, out)
        moved = mean(out)
        at = states_of(moved.detach(), mean(prior), mean_0=mean(exact), weight=w)
        aim = OrwCfmW2(w2=0.3).aim(at, 1.0)
        (found,) = torch.autograd.grad(((moved - aim.detach()) ** 2).sum(), out)
        factor = (found * wanted).sum() / (wanted * wanted).sum()
        assert float(factor) > 0
        torch.testing.assert_close(found, factor * wanted, atol=1e-4 * float(found.abs().max()), rtol=1e-3)


def test_weights_are_those_of_the_prompt() -> None:
    """exp(beta·r) over its mean in each group, also where it overflows."""
    samples = Samples(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 500.0, 2.0, 499.0]))
    found = RewardWeighted().weights(samples, 2.0)
    half = torch.tensor([2.0, -2.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(found, 2 * torch.stack([half[1], half[0], half[0], half[1]]))
    with pytest.raises(ValueError, match="reward of trajectory 0 is nan"):
        RewardWeighted().weights(Samples(torch.tensor([0, 0]), torch.tensor([float("nan"), 0.0])), 1.0)


def test_one_round_is_at_rest_at_the_denoiser_of_the_posterior() -> None:
    """Standard normal samples, a quadratic reward: with the posterior's own E[x_0 | x_t] the weighted pull has no affine part."""
    chain, beta = DDPMScheduler(clip_sample=False), 1.3
    chain.set_timesteps(6)
    a, b = (level.tolist() for level in signal_and_noise(chain, chain.timesteps.float()))
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 200_000, 1, dtype=torch.float64, generator=generator)
    objective = RewardWeighted()
    w = objective.weights(Samples(torch.zeros(len(x_0), dtype=torch.long), -0.5 * (x_0[:, 0] - 1) ** 2), beta)
    precision = 1 + beta  # of the posterior N(beta / precision, 1 / precision)
    for i in range(1, 6):
        x_t = a[i] * x_0 + b[i] * noise
        known = (beta + a[i] / b[i] ** 2 * x_t) / (precision + (a[i] / b[i]) ** 2)
        call = [
            StepCall(chain, chain.step, knowing("epsilon", end, x_t, a[i], b[i]), chain.timesteps[i], x_t)
            for end in (known, x_0)
        ]
        mean_q, mean_0 = (previous_sample(each.mean()) for each in call)
        at = states_of(mean_q, mean_q, mean_0=mean_0, weight=w)
        pull = objective.aim(at, beta) - mean_q
        for part in (pull, pull * x_t):
            assert abs(float(part.mean())) < 4 * float(part.std()) / len(x_0) ** 0.5
        assert abs(float((mean_0 - mean_q).mean())) > 4 * float(pull.std()) / len(x_0) ** 0.5  # unweighted it is not


def weighted(out: Path, iterations: int = 4, measured: float = 0.25, **objective: Any) -> Trainer:
    sizes = {"group": 64, "micro_batch": 64, "lr": 0.1, "updates_per_iteration": 4, "iterations": iterations}
    return run(out, objective=objective, train=sizes, behaviours=[{"component": "on_policy", "measured": measured}])


def test_rounds_run_away_and_the_second_term_holds_them(tmp_path: Path, shapes_unchecked: None) -> None:
    found = {}
    for w2 in (0.0, 2.0):
        trainer = weighted(tmp_path / str(w2), 8, measured=0, component="orw_cfm_w2", w2=w2)
        trainer.fit()
        found[w2] = float(trainer.sampler.draw([0] * 500, list(range(500))).reward.mean())
    begin_at_the_posterior(trainer)
    posterior = float(trainer.sampler.draw([0] * 500, list(range(500))).reward.mean())
    assert found[0.0] > 4 * posterior
    assert 0 < found[2.0] < posterior


def test_a_round_draws_from_what_it_began_as(tmp_path: Path, shapes_unchecked: None) -> None:
    """Never refreshed, samples stay the prior's; what is logged is the posterior's own; a run goes on from its checkpoint."""
    trainer = weighted(tmp_path / "whole", component="reward_weighted")
    trainer.fit()
    with trainer.updates.drawing():
        drawn = trainer.sources.draw(trainer.sampler, [0], 3, 1.3)["posterior"]
    with trainer.prior.as_prior():
        prior = trainer.sources.draw(trainer.sampler, [0], 3, 1.3)["posterior"]
    assert torch.equal(drawn.trajectory.x, prior.trajectory.x)
    first, *_, last = rows(trainer)
    assert first["kl"] == 0
    assert last["kl"] > 0.05
    weighted(tmp_path / "part", 2, component="reward_weighted").fit()
    weighted(tmp_path / "part", component="reward_weighted").fit()
    again = weighted(tmp_path / "part", component="reward_weighted")
    assert differing(state(trainer), state(again)) == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refresh is a number of iterations, at least 1, or null for never; got 0"):
        RewardWeighted(refresh=0)
    with pytest.raises(ValueError, match="w2 is a weight, 0 or more; got -1"):
        OrwCfmW2(w2=-1.0)
    buffer = {"component": "prior_buffer", "share": 0.5}
    with pytest.raises(ValueError, match="wrong on those of behaviours PriorBuffer"):
        run(tmp_path, objective={"component": "reward_weighted"}, behaviours=[buffer])
    budget = {"value": 1.0, "kl_budget": {"nats": 2.0}}
    blind = [{"component": "on_policy", "measured": 0}]
    with pytest.raises(ValueError, match="an older posterior draws what is learned from"):
        run(tmp_path, objective={"component": "reward_weighted"}, behaviours=blind, beta=budget)
