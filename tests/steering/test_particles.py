"""Particles against closed forms: log Z without bias, the posterior itself, lineages that replay, and what is refused."""

from __future__ import annotations

import math
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

from diffusion_rtb.chain.forward_process import denoised, network_predicts, signal_and_noise
from diffusion_rtb.chain.rollout import score, score_with_means
from diffusion_rtb.chain.seeds import generators, seed_of
from diffusion_rtb.steering import Aim, Method, Steered, steered
from diffusion_rtb.steering.best_of import BestOf
from diffusion_rtb.steering.smc import SMC
from pipelines.gaussian import Gaussian
from rewards.density import Density
from tests.oracles.tiny import tiny_stable_diffusion

QUADRATIC = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}
GROUPS, BETA = 192, 1.0


def prior() -> Gaussian:
    made = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=8, dtype="float64")
    made.load_weights()
    return made


def drawn(method: Method, groups: int = GROUPS) -> Steered:
    return steered(prior(), Density(QUADRATIC), method, [""] * groups, list(range(groups)), BETA)


@pytest.fixture(scope="module")
def smc() -> Steered:
    """24 particles, re-sampled whenever they differ much."""
    return drawn(SMC(24, threshold=0.9, temper=0.0))


@pytest.mark.parametrize("threshold", [0.9, 0.0])
def test_the_estimate_of_z_has_no_bias(threshold: float, smc: Steered) -> None:
    found = smc if threshold else drawn(SMC(24, threshold=0.0))
    assert found.log_z is not None
    z, exact = found.log_z.exp(), math.exp(prior().solve(BETA, **QUADRATIC).log_z)
    error = float(z.std()) / math.sqrt(GROUPS)
    assert error < 0.05 * exact
    assert abs(float(z.mean()) - exact) < 3.5 * error
    resampled = bool((found.ess[:-1] < 0.9).any()) if threshold else False
    assert resampled == (threshold > 0)


def test_the_particles_are_those_of_the_posterior(smc: Steered) -> None:
    mean, cov = prior().solve(BETA, **QUADRATIC).end
    x = smc.trajectory.x_0.unflatten(0, (GROUPS, -1))
    own = x.mean(1)
    error = own.std(0) / math.sqrt(GROUPS)
    assert bool(((own.mean(0) - mean).abs() < 4 * error).all())
    assert float((x.flatten(0, 1).T.cov() - cov).norm() / cov.norm()) < 0.1


def test_the_densities_of_a_lineage_are_those_of_its_replay(smc: Steered) -> None:
    trajectory = smc.trajectory
    starts = trajectory.x[:24, 0].unique(dim=0)
    assert len(starts) < 24  # survivors share ancestors
    again = score(prior(), [""] * trajectory.batch, trajectory)
    torch.testing.assert_close(again, trajectory.log_prob, rtol=0, atol=1e-9)
    rewards = Density(QUADRATIC)(prior().decode(trajectory.x_0), [""] * trajectory.batch)
    torch.testing.assert_close(rewards, smc.reward)


def test_the_means_of_a_lineage_are_those_of_its_replay(smc: Steered) -> None:
    assert smc.means is None
    found = steered(prior(), Density(QUADRATIC), SMC(24, threshold=0.9), [""] * 3, [0, 1, 2], BETA, means=True)
    assert found.means is not None
    _, _, means = score_with_means(prior(), [""] * 72, found.trajectory)
    noisy = found.trajectory.stochastic
    torch.testing.assert_close(found.means[:, noisy], means[:, noisy], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.means[:, ~noisy], found.trajectory.x[:, 1:][:, ~noisy])


def test_the_best_of_n_is_the_best_of_n_independent_samples() -> None:
    n, groups, pipe = 5, 3, prior().pipe
    found = drawn(BestOf(n), groups)
    rows = generators([seed_of(seed, "particle", k) for seed in range(groups) for k in range(n)])
    x = pipe(batch_size=n * groups, num_inference_steps=8, eta=1.0, generator=rows).vectors
    rewards = Density(QUADRATIC)(x, []).unflatten(0, (groups, n))
    torch.testing.assert_close(found.reward[::n], rewards.max(1).values)
    assert found.log_z is not None
    torch.testing.assert_close(found.log_z, rewards.logsumexp(1) - math.log(n))


def test_a_group_depends_on_its_seed_alone() -> None:
    method = SMC(6, threshold=1.0)
    both = steered(prior(), Density(QUADRATIC), method, ["", ""], [7, 8], BETA)
    alone = steered(prior(), Density(QUADRATIC), method, [""], [8], BETA)
    torch.testing.assert_close(both.trajectory.x[6:], alone.trajectory.x)


def test_a_stock_pipeline_is_steered_in_a_block_and_put_back() -> None:
    pipe = tiny_stable_diffusion()

    def brightness(x_0: Tensor) -> Tensor:
        return x_0.flatten(1).mean(1)

    call: dict[str, Any] = {"num_inference_steps": 3, "eta": 1.0, "output_type": "latent"}
    with SMC(4, threshold=1.0, temper=0.0).around(pipe, Aim(brightness, 50.0)) as chain:
        latents = pipe(["a cat"] * 4 + ["a dog"] * 4, **call).images
    assert "step" not in vars(pipe.scheduler)
    torch.testing.assert_close(chain.trajectory.x_0, latents)
    torch.testing.assert_close(chain.reward.float(), brightness(latents))
    assert chain.log_z.shape == (2,)
    assert len(chain.trajectory.x[:4, 0].unique(dim=0)) < 4
    best = BestOf(4).around(pipe, Aim(brightness, 50.0))
    with best:  # no density: eta is 0
        pipe(["a cat"] * 4, num_inference_steps=3, output_type="latent")
    assert len(best.reward.unique()) == 1


SCHEDULERS = [
    *((DDIMScheduler, kind) for kind in ("epsilon", "v_prediction", "sample")),
    *((DDPMScheduler, kind) for kind in ("epsilon", "v_prediction")),
    *((EulerAncestralDiscreteScheduler, kind) for kind in ("epsilon", "v_prediction")),
]


@pytest.mark.parametrize(("kind", "predicts"), SCHEDULERS)
def test_the_estimate_of_x_0_is_that_of_the_scheduler_itself(kind: Any, predicts: str) -> None:
    scheduler = kind(
        prediction_type=predicts, **({} if kind is EulerAncestralDiscreteScheduler else {"clip_sample": False})
    )
    scheduler.set_timesteps(10)
    x, output = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind()
    t = scheduler.timesteps[4]
    scheduler.scale_model_input(x, t)
    a, b = (float(values[4]) for values in signal_and_noise(scheduler, scheduler.timesteps.float()))
    own = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
    torch.testing.assert_close(denoised(network_predicts(scheduler), x, output, a, b), own, rtol=1e-4, atol=1e-5)


def test_the_estimate_of_x_0_of_a_flow() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x_0, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    a, b = (float(values[4]) for values in signal_and_noise(scheduler, scheduler.timesteps.float()))
    found = denoised(network_predicts(scheduler), a * x_0 + b * noise, noise - x_0, a, b)
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-5)


def first(x_0: Tensor) -> Tensor:
    return x_0.flatten(1)[:, 0]


def test_what_cannot_be_steered_is_refused() -> None:
    pipe = prior().pipe
    with (
        pytest.raises(ValueError, match="3 samples, which are no whole groups of 2"),
        SMC(2).around(pipe, Aim(first, 1.0)),
    ):
        pipe(batch_size=3, num_inference_steps=4, eta=1.0)
    with pytest.raises(ValueError, match=r"deterministic.*eta"), SMC(2).around(pipe, Aim(first, 1.0)):
        pipe(batch_size=2, num_inference_steps=4)
    with pytest.raises(ValueError, match="not finite"), SMC(2).around(pipe, Aim(lambda x: x[:, 0] * math.nan, 1.0)):
        pipe(batch_size=2, num_inference_steps=4, eta=1.0)
    unused = SMC(2).around(pipe, Aim(first, 1.0))
    with pytest.raises(RuntimeError, match="Nothing was steered"), unused:
        _ = unused.log_z
    several = tiny_stable_diffusion()
    several.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    with pytest.raises(ValueError, match="solver_order=1"), SMC(2).around(several, Aim(first, 1.0)):
        pass
