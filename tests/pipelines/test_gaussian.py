"""The Gaussian prior: exact denoiser, exact posterior of the discrete chain, and the protocol of a prior.

Tolerances: what runs in float64 is compared to 1e-9 of its size; sums and inverses of a few small matrices leave three digits.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.components import build, describe, short_names
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import trust_pcl_residual
from diffusion_rtb.run.checkpoint import check_compatible
from diffusion_rtb.run.checkpoint_reading import CheckpointError
from diffusion_rtb.run.process_state import load_parameters
from pipelines._analytic.linear_gaussian import AffineChain, Quadratic, Tilt, kl
from pipelines.gaussian import Gaussian
from tests.oracles.analytic import Joint, noised_gaussian, sampler_formula, score_by_autograd, spd
from tests.oracles.terms import make_terms

MEAN = [1.0, -2.0]
COVARIANCE = [[2.0, 0.6], [0.6, 0.5]]
LINEAR: dict[str, Any] = {"linear": [0.7, -0.4], "constant": 0.3}
QUADRATIC: dict[str, Any] = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]], "linear": [0.2, 0.0]}
BETA = 1.5
SAMPLERS = ["DDIMScheduler", "DDPMScheduler"]
cases = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def prior(**settings: Any) -> Gaussian:
    defaults: dict[str, Any] = {"steps": 6, "dtype": "float64"}
    return Gaussian(MEAN, COVARIANCE, **defaults | settings)


def attached(**settings: Any) -> Gaussian:
    made = prior(**settings)
    made.attach()
    return made


def perturb(made: Gaussian, size: float = 0.2) -> None:
    for parameter in made.parameters().values():
        parameter.data.add_(size * torch.randn_like(parameter))


def drawn(made: Gaussian, count: int = 5) -> Trajectory:
    return rollout(made, [""] * count, range(count))


def log_p(made: Gaussian, trajectory: Trajectory) -> Tensor:
    with made.as_prior():
        return score(made, [""] * trajectory.batch, trajectory)


@cases
@given(seeds, st.integers(1, 4), st.floats(0.0005, 0.9995))
def test_denoiser_is_the_score_of_the_noised_density(seed: int, dim: int, alpha_bar: float) -> None:
    mean = np.random.default_rng(seed).normal(size=dim)
    cov = spd(seed, dim)
    made = Gaussian(mean.tolist(), cov.tolist(), steps=2, dtype="float64")
    denoiser = made.pipe.denoiser
    standardised = torch.tensor(cov / np.trace(cov) * dim)
    x = torch.randn(3, dim, dtype=torch.float64)
    density = noised_gaussian(torch.zeros(dim, dtype=torch.float64), standardised, alpha_bar)
    expected = -math.sqrt(1 - alpha_bar) * score_by_autograd(density, x)
    assert_close(denoiser.noise(x, torch.tensor(alpha_bar, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9)
    back = (made.decode(x) - torch.tensor(mean)) / math.sqrt(np.trace(cov) / dim)
    assert_close(back, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scheduler", "eta"), [("DDIMScheduler", 1.0), ("DDIMScheduler", 0.6), ("DDPMScheduler", 1.0)])
@pytest.mark.filterwarnings("ignore:.*not memoryless")
def test_chain_is_the_papers_sampler(scheduler: str, eta: float) -> None:
    made = prior(scheduler=scheduler, eta=eta)
    alpha_bar = made.schedule.alpha_bar(made.steps).tolist()
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64) / 1.25  # standardised by the mean variance
    eye = torch.eye(2, dtype=torch.float64)
    chain = made.chain()
    # Stock schedulers keep alpha_bar in float32: relative 1e-6 after a product over the steps.
    for i, (by_x, by_noise, std) in enumerate(sampler_formula(scheduler, alpha_bar, eta)):
        now = alpha_bar[made.steps - i]
        predicts = math.sqrt(1 - now) * torch.linalg.inv(now * covariance + (1 - now) * eye)
        assert_close(chain.A[i], by_x * eye + by_noise * predicts, rtol=1e-4, atol=1e-5)
        assert_close(chain.C[i], std**2 * eye, rtol=1e-4, atol=1e-7)
    assert not chain.b.any()


def test_end_of_the_chain_tends_to_the_data() -> None:
    """The error of a chain of T steps falls as 1/T, and what stays is the noise left in x_0."""
    cov, error = torch.tensor(COVARIANCE, dtype=torch.float64), []
    for steps in (50, 100, 200):
        made = prior(steps=steps, schedule={"noise": 0.002})
        means, covs = made.chain().marginals
        mean, found = made.in_data_units(means[-1], covs[-1])
        assert_close(mean, torch.tensor(MEAN, dtype=torch.float64), rtol=0, atol=1e-9)
        error.append(float((found - cov).abs().max()))
    assert error[2] < 0.06  # of a variance of 2
    assert 1.6 < error[0] / error[1] < 2.5
    assert 1.6 < error[1] / error[2] < 2.5


@pytest.mark.parametrize("scheduler", SAMPLERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rollout_replay_and_closed_form_agree(scheduler: str, dtype: str) -> None:
    made = attached(scheduler=scheduler, dtype=dtype)
    perturb(made)
    trajectory = drawn(made)
    assert trajectory.x.dtype == getattr(torch, dtype)
    assert trajectory.timesteps.tolist() == [6, 5, 4, 3, 2, 1]
    assert trajectory.stochastic.tolist() == [True] * 5 + [scheduler == "DDIMScheduler"]
    assert torch.equal(score(made, [""] * 5, trajectory), trajectory.log_prob)  # parity 0
    # float32 rounds means to 1e-7 of x, which the smallest deviation of 0.03 and z of 4 turn into 1e-4 nats.
    tolerance = 1e-8 if dtype == "float64" else 2e-3
    chain = made.chain()
    assert_close(chain.log_prob(trajectory.x.double()), trajectory.log_prob, rtol=tolerance, atol=tolerance)
    with made.as_prior():
        assert_close(
            made.chain().log_prob(trajectory.x.double()), log_p(made, trajectory), rtol=tolerance, atol=tolerance
        )


def test_part_of_the_steps_can_be_replayed() -> None:
    made = attached()
    perturb(made)
    trajectory, call = drawn(made), made.arguments([""] * 5)
    some = replay_backward(made.pipe, trajectory, torch.ones(5, 6), steps=[1, 4], dtype=torch.float64, **call)
    assert torch.equal(some[:, [1, 4]], trajectory.log_prob[:, [1, 4]])
    gradients = [parameter.grad for parameter in made.parameters().values()]
    for gradient in gradients:
        assert gradient is not None
        used = gradient.flatten(1).any(1).tolist()  # by timestep 1 … 6
        assert used == [False, True, False, False, True, False]


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_samples_depend_on_their_own_seed_only(scheduler: str) -> None:
    """Also with the noise of all steps drawn at once, and with the recorder around the scheduler."""
    made = prior(scheduler=scheduler)
    many = rollout(made, [""] * 4, [7, 8, 9, 10])
    few = rollout(made, [""] * 2, [9, 7])
    assert_close(few.x, many.x[[2, 0]], rtol=1e-12, atol=1e-12)  # matrix products round by the batch's size
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9, 10)]
    stock = made.pipe(**made.arguments([""] * 4), generator=generators)
    assert torch.equal(stock.vectors, made.decode(many.x_0))
    one = made.pipe(batch_size=3, num_inference_steps=6, eta=1.0, generator=torch.Generator().manual_seed(0))
    assert one.vectors.shape == (3, 2)
    with pytest.raises(ValueError, match="4 generators for batch_size 3"):
        made.pipe(batch_size=3, eta=1.0, generator=generators)


def test_samples_have_the_chains_moments() -> None:
    made = prior(scheduler="DDIMScheduler", dtype="float32")
    trajectory = rollout(made, [""] * 4000, range(4000))
    means, covs = made.chain().marginals
    # Standard errors of 4,000 samples: 0.016 for a mean, 0.03 for a variance of 1.6.
    for i in (0, 3, 6):
        x = trajectory.x[:, i].double()
        assert_close(x.mean(0), means[i], rtol=0, atol=0.08)
        assert_close(x.T.cov(), covs[i], rtol=0, atol=0.15)
    x = prior(dtype="float64").chain().sample(4000, torch.Generator().manual_seed(0))
    assert_close(x[:, -1].T.cov(), covs[-1], rtol=0, atol=0.15)


@cache
def tilt(kind: str, scheduler: str = "DDIMScheduler", steps: int = 6) -> Tilt:
    return prior(scheduler=scheduler, steps=steps).solve(BETA, **(LINEAR if kind == "linear" else QUADRATIC))


def random_chain(seed: int, dim: int, steps: int) -> AffineChain:
    draw = torch.Generator().manual_seed(seed)
    A, b = (torch.randn(steps, dim, *more, generator=draw, dtype=torch.float64) for more in ((dim,), ()))
    return AffineChain(0.5 * A, b, torch.stack([torch.tensor(spd(seed + i, dim)) for i in range(steps)]))


@cases
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_recursion_is_conditioning_of_the_joint(seed: int, dim: int, steps: int, linear: bool) -> None:
    """log F, log Z, transitions and x_0's posterior against one big Normal over the whole trajectory."""
    draw = torch.Generator().manual_seed(seed)
    P = torch.zeros(dim, dim, dtype=torch.float64) if linear else torch.tensor(spd(seed, dim, 0.0))
    h, c = torch.randn(dim, generator=draw, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    found = Tilt(random_chain(seed, dim, steps), Quadratic(P, h, c))
    joint = Joint.of(found.p, found.beta_r)
    assert found.log_z == pytest.approx(joint.log_z(), rel=1e-9, abs=1e-9)
    x = torch.randn(dim, generator=draw, dtype=torch.float64)
    for i in range(steps):
        assert float(found.log_f[i](x[None])[0]) == pytest.approx(joint.log_f(i, x.numpy()), rel=1e-8, abs=1e-8)
        mean, cov = joint.tilted_transition(i, x.numpy())
        assert_close(found.posterior.A[i] @ x + found.posterior.b[i], torch.tensor(mean), rtol=1e-8, atol=1e-8)
        assert_close(found.posterior.C[i], torch.tensor(cov), rtol=1e-8, atol=1e-8)
    mean, cov = joint.tilted()
    assert_close(found.end[0], torch.tensor(mean[-dim:]), rtol=1e-8, atol=1e-8)
    assert_close(found.end[1], torch.tensor(cov[-dim:, -dim:]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scheduler", SAMPLERS)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_recursion_holds_for_the_pipelines_chain(kind: str, scheduler: str) -> None:
    found = tilt(kind, scheduler)
    joint = Joint.of(found.p, found.beta_r)
    assert found.log_z == pytest.approx(joint.log_z(), rel=1e-9)
    for i, x in enumerate(np.random.default_rng(0).normal(size=(6, 2))):
        assert float(found.log_f[i](torch.tensor(x)[None])[0]) == pytest.approx(joint.log_f(i, x), rel=1e-8)


def test_reward_is_in_data_units() -> None:
    made, x = prior(), torch.randn(50, 2, dtype=torch.float64)
    data = made.decode(x)
    apart = data - torch.tensor(QUADRATIC["mean"])
    P, a = torch.tensor(QUADRATIC["precision"]).double(), torch.tensor(QUADRATIC["linear"]).double()
    assert_close(made.reward(**QUADRATIC)(x), data @ a - 0.5 * torch.einsum("bi,ij,bj->b", apart, P, apart))
    slope = torch.tensor(LINEAR["linear"], dtype=torch.float64)
    assert_close(made.reward(**LINEAR)(x), data @ slope + LINEAR["constant"])
    assert_close(made.reward(precision=[2.0, 3.0])(x), -0.5 * (data.square() @ torch.tensor([2.0, 3.0]).double()))
    assert_close(made.reward(precision=2.0)(x), -data.square().sum(1))


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_log_z_of_long_chains_is_that_of_the_data(kind: str) -> None:
    """N(mean, C)·exp(beta·r): what the chain's log Z and posterior tend to, to first order in the length of a step."""
    made = prior(steps=400, schedule={"noise": 0.005})
    arguments = LINEAR if kind == "linear" else QUADRATIC
    found = made.solve(BETA, **arguments)
    m, C = torch.tensor(MEAN).double(), torch.tensor(COVARIANCE).double()
    P = BETA * torch.tensor(arguments.get("precision", [[0.0, 0.0], [0.0, 0.0]])).double()
    h = BETA * torch.tensor(arguments["linear"]).double() + P @ torch.tensor(arguments.get("mean", [0.0, 0.0])).double()
    cov = torch.linalg.inv(torch.linalg.inv(C) + P)
    mean = cov @ (torch.linalg.solve(C, m) + h)
    found_mean, found_cov = made.in_data_units(*found.end)
    assert_close(found_mean, mean, rtol=0.02, atol=0.02)
    assert_close(found_cov, cov, rtol=0.02, atol=0.02)
    # Bayes at the posterior mean: log Z = log prior + beta·r - log posterior.
    reward = BETA * made.reward(**arguments)(_standardised(made, mean)[None])[0]
    log_z = MultivariateNormal(m, C).log_prob(mean) + reward - MultivariateNormal(mean, cov).log_prob(mean)
    assert found.log_z == pytest.approx(float(log_z), abs=0.02)


def _standardised(made: Gaussian, x: Tensor) -> Tensor:
    denoiser = made.pipe.denoiser
    return (x - denoiser.shift) / denoiser.scale


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_linear_reward_is_met_exactly(scheduler: str) -> None:
    """Residual log F(x_T) + log q - log p - beta·r = 0 on every trajectory of the pipeline, also on those nobody would draw."""
    made = attached(scheduler=scheduler)
    found = made.solve(BETA, **LINEAR)
    assert float(found.gap.sum()) == pytest.approx(0, abs=1e-12)
    made.set_posterior(found.best)
    for trajectory in (drawn(made), rollout(made, [""] * 5, range(5), noise_scale=lambda std: 4.0)):
        log_q, x_T = score(made, [""] * 5, trajectory), trajectory.x[:, 0]
        reward = BETA * made.reward(**LINEAR)(trajectory.x_0)
        residual = found.log_f[0](x_T) + (log_q - log_p(made, trajectory)).sum(1) - reward
        assert_close(residual, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_rtb_and_every_stretch_vanish_at_the_posterior() -> None:
    """With a signal of 1e-4 in x_T the chain is memoryless to 1e-4 nats, and one scalar log Z fits all trajectories."""
    made = attached(schedule={"signal": 1e-4}, steps=12)
    found = made.solve(BETA, **LINEAR)
    made.set_posterior(found.best)
    trajectory = drawn(made)
    reward = made.reward(**LINEAR)(trajectory.x_0)
    terms = make_terms(trajectory.log_prob, log_p(made, trajectory), reward, x=trajectory.x)
    answer = RTB("vargrad")(terms, BETA)
    assert answer.residual.abs().max() < 5e-4
    assert float(answer.log_z[0]) == pytest.approx(found.log_z, abs=5e-4)
    values = torch.stack([f(trajectory.x[:, i]) for i, f in enumerate(found.log_f)], dim=1) / BETA
    for length in (1, 2, 3, 4, 6, 12):
        stretches = trust_pcl_residual(trajectory.log_prob, terms.log_p, values[:, ::length], BETA)
        assert stretches.abs().max() < 1e-9


def test_a_quadratic_reward_is_met_by_the_posteriors_own_variances() -> None:
    made = prior()
    found = made.solve(BETA, **QUADRATIC)
    trajectory = drawn(made)
    log_q = found.posterior.log_prob(trajectory.x)
    residual = found.log_f[0](trajectory.x[:, 0]) + (log_q - trajectory.log_prob).sum(1) - found.beta_r(trajectory.x_0)
    assert_close(residual, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheduler", SAMPLERS)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_elbo_kl_and_gap_are_consistent(kind: str, scheduler: str) -> None:
    """Three ways to the same numbers: log F at the start, expected reward minus KL, and the divergence of the two chains."""
    found = tilt(kind, scheduler)
    assert found.elbo(found.posterior) == pytest.approx(found.mean_log_f, abs=1e-9)
    assert found.elbo(found.best) == pytest.approx(found.best_elbo, abs=1e-9)
    assert_close(kl(found.best, found.posterior), found.gap, rtol=1e-9, atol=1e-9)
    assert found.best_elbo <= found.mean_log_f <= found.log_z
    assert found.elbo(found.p) <= found.best_elbo
    assert float(kl(found.p, found.p).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_no_chain_of_fixed_variance_beats_the_best(kind: str) -> None:
    """The ELBO's gradient with respect to every number of the chain is 0 there, and any other chain has a lower one."""
    found = tilt(kind)
    A, b = (part.clone().requires_grad_() for part in (found.best.A, found.best.b))
    q = AffineChain(A, b, found.best.C)
    means, covs = q.marginals
    elbo = found.beta_r.expectation(means[-1], covs[-1]) - kl(q, found.p).sum()
    for gradient in torch.autograd.grad(elbo, [A, b]):
        assert gradient.abs().max() < 1e-8
    for size in (1e-3, 1e-1):
        A, b = (part + size * torch.randn_like(part) for part in (found.best.A, found.best.b))
        moved = AffineChain(A, b, found.best.C)
        assert found.elbo(moved) < found.best_elbo


def test_gap_closes_with_the_number_of_steps() -> None:
    gaps = [float(tilt("quadratic", steps=steps).gap.sum()) for steps in (20, 40, 80)]
    assert 1.6 < gaps[0] / gaps[1] < 2.6
    assert 1.6 < gaps[1] / gaps[2] < 2.6


def test_samples_measure_the_same_elbo() -> None:
    """Monte Carlo through the pipeline at the best chain, within 4 standard errors of the closed form."""
    made = attached(dtype="float32")
    found = made.solve(BETA, **QUADRATIC)
    made.set_posterior(found.best)
    trajectory = rollout(made, [""] * 2000, range(2000))
    weight = found.beta_r(trajectory.x_0.double()) - (trajectory.log_prob - log_p(made, trajectory)).sum(1)
    error = float(weight.std()) / math.sqrt(2000)
    assert float(weight.mean()) == pytest.approx(found.best_elbo, abs=4 * error)
    assert error < 0.05
    assert found.elbo(made.chain()) == pytest.approx(found.best_elbo, abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_training_finds_the_best_chain(kind: str) -> None:
    """On-policy VarGrad, 60 updates through the pipeline; its ELBO is then known without sampling.

    Its expected gradient is that of KL(q || posterior), whose minimum is the best chain, gap or no gap.
    """
    arguments = LINEAR if kind == "linear" else QUADRATIC
    made = attached(dtype="float32", steps=4)
    found, objective = made.solve(BETA, **arguments), RTB("vargrad")
    optimizer = torch.optim.Adam(made.parameters().values(), lr=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    prompts, call = [""] * 256, made.arguments([""] * 256)
    start = found.elbo(made.chain())
    for iteration in range(60):
        trajectory = rollout(made, prompts, range(256 * iteration, 256 * (iteration + 1)))
        reward = made.reward(**arguments)(trajectory.x_0.double())
        terms = make_terms(trajectory.log_prob, log_p(made, trajectory), reward, x=trajectory.x)
        objective(terms, BETA).loss.backward()
        assert terms.log_q.grad is not None
        optimizer.zero_grad()
        replay_backward(made.pipe, trajectory, terms.log_q.grad, dtype=torch.float64, **call)
        optimizer.step()
        schedule.step()
    assert start < found.best_elbo - 0.2
    assert found.elbo(made.chain()) == pytest.approx(found.best_elbo, abs=0.02)


def test_it_is_a_prior() -> None:
    made = prior()
    assert isinstance(made, Prior)
    assert (made.dims, made.device, made.parameters()) == ((2,), torch.device("cpu"), {})
    assert made.features(["", "a"]).shape == (2, 0)
    assert made.arguments(["", ""]) == {"batch_size": 2, "num_inference_steps": 6, "eta": 1.0}
    assert "eta" not in prior(scheduler="DDPMScheduler").arguments([""])
    assert short_names("prior")["gaussian"] == "pipelines.gaussian:Gaussian"
    assert not any(name.startswith("_") for name in short_names("prior"))


def test_posterior_starts_as_the_prior_and_can_be_switched_off() -> None:
    made = prior()
    before = drawn(made)
    made.attach()
    assert torch.equal(drawn(made).x, before.x)
    perturb(made)
    after = drawn(made)
    assert not torch.allclose(after.x, before.x, atol=1e-3)
    with pytest.raises(KeyError), made.as_prior(), made.as_prior():
        raise KeyError
    assert torch.equal(drawn(made).x, after.x)
    with made.as_prior():
        with made.as_prior():
            pass
        assert torch.equal(drawn(made).x, before.x)


def test_only_the_correction_is_trainable() -> None:
    made = attached()
    assert {name: tuple(p.shape) for name, p in made.parameters().items()} == {"slope": (6, 2, 2), "offset": (6, 2)}
    assert all(parameter.requires_grad for parameter in made.parameters().values())
    assert sum(parameter.numel() for parameter in made.pipe.denoiser.parameters() if parameter.requires_grad) == 36
    with pytest.raises(ValueError, match="attached already"):
        made.attach()


def test_parameters_travel_between_priors() -> None:
    made, other = attached(), attached()
    perturb(made)
    state = made.parameters()
    load_parameters(other, state)
    assert torch.equal(drawn(other).x, drawn(made).x)
    longer = attached(steps=7)
    with pytest.raises(ValueError, match=r"2 parameters differ, first 'offset' \(here \(7, 2\), saved \(6, 2\)\)"):
        load_parameters(longer, state)
    assert not longer.parameters()["slope"].any()


def test_fingerprint_is_json_and_tells_priors_apart() -> None:
    trained = attached().fingerprint()
    assert json.loads(json.dumps(trained)) == trained
    check_compatible(trained, attached().fingerprint())
    with pytest.raises(CheckpointError, match=r"density\.covariance"):
        check_compatible(trained, Gaussian(MEAN, 2.0, steps=6).fingerprint())
    with pytest.raises(CheckpointError, match=r"sampler\.schedule\.width: 2\.0 in the checkpoint, 3\.0 now"):
        check_compatible(trained, attached(schedule={"width": 3.0}).fingerprint())


def test_export_is_sampled_by_its_own_snippet(tmp_path: Path) -> None:
    made = attached()
    with pytest.raises(ValueError, match="no posterior to export"):
        prior().export(tmp_path, "card")
    perturb(made)
    made.export(tmp_path, "# card")
    assert (tmp_path / "README.md").read_text() == "# card"
    code = (
        made.snippet(str(tmp_path)) + "\nfrom safetensors.torch import save_file\nsave_file({'x': x}, 'x.safetensors')"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(root), "PATH": ""})
    from safetensors.torch import load_file

    found = load_file(tmp_path / "x.safetensors")["x"]
    generator = torch.Generator().manual_seed(0)
    call = made.arguments([""] * 1000)
    assert torch.equal(found, made.pipe(**call, generator=generator).vectors)


def test_importing_the_prior_imports_no_diffusers() -> None:
    code = "import sys, pipelines.gaussian, pipelines.gmm; raise SystemExit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": [[1.0, 2.0], [2.0, 1.0]]}, "eigenvalue -1: it must be positive definite"),
        ({"covariance": [[1.0, 1.0], [1.0, 1.0]]}, "positive definite"),
        ({"covariance": -1.0}, "eigenvalue -1"),
        ({"covariance": [1.0, 0.0]}, "eigenvalue 0"),
        ({"covariance": [[1.0, 0.5], [0.0, 1.0]]}, "not symmetric"),
        ({"covariance": [[1.0, 0.0, 0.0]] * 3}, r"shape \(3, 3\): give a 2 x 2 matrix"),
        ({"covariance": [[1.0], [0.0, 1.0]]}, "lists of equal length"),
        ({"covariance": math.nan}, "every number must be finite"),
        ({"mean": []}, "at least one number"),
        ({"scheduler": "DDIMSheduler"}, "Did you mean 'DDIMScheduler'"),
        ({"scheduler": "EulerDiscreteScheduler"}, "Choose one of DDIMScheduler, DDPMScheduler"),
        ({"scheduler": "DDPMScheduler", "eta": 0.5}, "has no eta"),
        ({"eta": -0.1}, r"outside \[0, 1\]"),
        ({"steps": 1}, "at least 2 steps"),
        ({"dtype": "float16"}, "Input should be 'float32' or 'float64'"),
        ({"device": "gpu"}, "not a torch device"),
        ({"schedule": {"sigma": 1.0}}, "schedule has no 'sigma'"),
        ({"schedule": {"widht": 1.0}}, "Did you mean 'width'"),
        ({"schedule": {"signal": 0.0}}, "must lie in"),
        ({"schedule": {"noise": math.inf}}, "give a finite number"),
        ({"schedule": {"width": 0.0}}, "must be positive"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"mean": MEAN, "covariance": COVARIANCE} | settings
    with pytest.raises(ValueError, match=message):
        describe({"component": "gaussian"} | arguments, "prior")


def test_components_are_checked_by_their_annotations() -> None:
    made = build({"component": "gaussian", "mean": [0, 1], "covariance": [1, 2], "steps": 3}, "prior")
    assert made.dims == (2,)
    with pytest.raises(ValueError, match="covariance"):
        describe({"component": "gaussian", "mean": [0.0], "covariance": "wide"}, "prior")
    with pytest.raises(ValueError, match="has no argument 'means'"):
        describe({"component": "gaussian", "means": [0.0]}, "prior")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "needs `precision`, `linear` or both"),
        ({"linear": [1.0]}, "linear has the shape .* give 2 numbers"),
        ({"precision": [[1.0]]}, "2 x 2"),
        ({"precision": -5.0}, r"E\[exp\(beta·r\)\] is infinite"),
    ],
)
def test_impossible_rewards_are_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = prior().solve(BETA, **reward).log_z


def test_a_mildly_growing_reward_is_allowed() -> None:
    """r = +x²/2·0.2 on a prior of variance 1 at beta 1: log Z = -1/2 log(1 - 0.2) in the limit of many steps."""
    found = Gaussian([0.0], 1.0, steps=300, dtype="float64", schedule={"noise": 0.005}).solve(1.0, precision=-0.2)
    assert found.log_z == pytest.approx(-0.5 * math.log(0.8), abs=0.005)


def test_only_chains_with_the_priors_variances_can_be_set() -> None:
    with pytest.raises(ValueError, match="call attach"):
        prior().set_posterior(tilt("linear").best)
    with pytest.raises(ValueError, match="take `best`"):
        attached().set_posterior(tilt("quadratic").posterior)
    with pytest.raises(ValueError, match="take `best`"):
        attached(steps=5).set_posterior(tilt("linear").best)
