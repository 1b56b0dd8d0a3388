"""The mixture prior: exact denoiser, known posterior, the truth as a sampler, a correction that learns, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.components import build, describe, short_names
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.resampling import systematic_resample
from diffusion_rtb.run.checkpoint import check_compatible
from diffusion_rtb.run.checkpoint_reading import CheckpointError
from diffusion_rtb.run.process_state import load_parameters
from pipelines._analytic.mixture import Mixture
from pipelines.gmm import GMM, MEANS, POSTERIOR, VARIANCE
from tests.oracles.analytic import GRID, chain_log_z, noised_mixture, sampler_formula, score_by_autograd
from tests.oracles.terms import make_terms

TWO: dict[str, Any] = {"means": [[-2.0, 1.0], [2.0, 0.0]], "variance": 0.3, "weights": [0.4, 0.6]}
SMALL: dict[str, Any] = {"steps": 8, "width": 16, "layers": 2, "frequencies": 3}


EXAMPLE: dict[str, Any] = {
    "component": "density",
    "density": {"means": [list(mode) for mode in POSTERIOR], "variance": 0.3, "weights": list(POSTERIOR.values())},
    "minus": {"means": [list(mean) for mean in MEANS], "variance": 0.3},
}


def two(**settings: Any) -> GMM:
    return GMM(**TWO | SMALL | settings)


def attached(**settings: Any) -> GMM:
    made = two(**settings)
    made.attach(seed=1)
    return made


def perturb(made: GMM) -> None:
    for parameter in made.parameters().values():
        parameter.data.add_(0.2 * torch.randn_like(parameter))


def drawn(made: GMM, count: int = 5) -> Trajectory:
    return rollout(made, [""] * count, range(count))


def log_p(made: GMM, trajectory: Trajectory) -> Tensor:
    with made.as_prior():
        return score(made, [""] * trajectory.batch, trajectory)


def log_reward(made: GMM, posterior: Mixture, trajectory: Trajectory) -> Tensor:
    x = made.decode(trajectory.x_0)
    return posterior.log_prob(x) - made.mixture.log_prob(x)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.floats(0.0005, 0.9995))
def test_denoiser_is_the_score_of_the_noised_mixture(seed: int, dim: int, modes: int, alpha_bar: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(modes, dim, generator=draw, dtype=torch.float64)
    weights = torch.rand(modes, generator=draw, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    made = GMM(means.tolist(), weights.tolist(), 0.5, steps=2, dtype="float64")
    spread = (weights @ (means - weights @ means).square()).mean() + 0.5  # mean variance of the data
    x = torch.randn(4, dim, generator=draw, dtype=torch.float64)
    standardised = (means - weights @ means) / spread.sqrt()
    density = noised_mixture(standardised, weights, float(0.5 / spread), alpha_bar)
    expected = -math.sqrt(1 - alpha_bar) * score_by_autograd(density, x)
    found = made.pipe.denoiser.noise(x, torch.tensor(alpha_bar, dtype=torch.float64))
    assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert_close(made.decode(x), weights @ means + spread.sqrt() * x, rtol=1e-9, atol=1e-9)


def test_far_away_the_denoiser_is_finite() -> None:
    """A vector that no mode explains has weights of e^-1000 and less; none of them may be 0/0."""
    x = torch.tensor([[1e3, -1e3], [0.0, 1e4]])
    for t in (1, 8):
        assert two().pipe.denoiser(x, torch.tensor(t)).isfinite().all()


def test_density_is_that_of_torch_distributions() -> None:
    mixture, x = two().mixture, 3 * torch.randn(20, 2, dtype=torch.float64)
    weights, means = (torch.tensor(TWO[name], dtype=torch.float64) for name in ("weights", "means"))
    expected = MixtureSameFamily(Categorical(weights), Independent(Normal(means, math.sqrt(0.3)), 1))
    assert_close(mixture.log_prob(x), expected.log_prob(x), rtol=1e-9, atol=1e-9)


def test_exact_samples_have_the_weights_and_the_variance() -> None:
    made = GMM()
    posterior = made.posterior()
    x = posterior.sample(20_000, torch.Generator().manual_seed(0))
    shares = posterior.shares(x)
    # A share of 1/4 has a standard error of 0.003; outside 4 standard deviations lie exp(-8) = 0.03 % of a 2-D mode.
    assert (shares[:-1] - posterior.weights).abs().max() < 0.012
    assert float(shares[-1]) == pytest.approx(math.exp(-8), abs=6e-4)
    mode = posterior.mode(x)
    apart = (x - posterior.means[mode])[mode >= 0]
    assert float(apart.square().mean()) == pytest.approx(VARIANCE, rel=0.02)


def test_modes_are_told_apart() -> None:
    mixture = GMM().mixture
    far = 4 * math.sqrt(VARIANCE)
    x = torch.tensor([[0.1, 0.0], [5.0, 10.0 + 0.99 * far], [5.0, 10.0 + 1.01 * far], [2.5, 2.5]])
    expected = [MEANS.index((0.0, 0.0)), MEANS.index((5.0, 10.0)), -1, -1]
    assert mixture.mode(x).tolist() == expected
    assert mixture.mode(x, within=100.0).tolist()[2] == MEANS.index((5.0, 10.0))
    shares = mixture.shares(x)
    assert shares[[expected[0], expected[1], -1]].tolist() == [0.25, 0.25, 0.5]
    assert float(shares.sum()) == 1


def test_the_example_is_the_papers() -> None:
    """log Z = 0, E_posterior[r] = KL = 1.157, E_prior[r] = -34.9, ESS of prior samples 0.276: by quadrature over the plane."""
    made = GMM()
    posterior = made.posterior()
    assert len(MEANS) == 25
    assert sorted(round(61 * weight) for weight in POSTERIOR.values()) == [4, 4, 4, 4, 5, 5, 10, 10, 15]
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    prior, target = made.mixture.log_prob(x), posterior.log_prob(x)
    cell = float(axis[1] - axis[0]) ** 2
    reward = target - prior
    assert cell * float((prior + reward).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert cell * float((target.exp() * reward).sum()) == pytest.approx(1.157, abs=1e-3)
    assert cell * float((prior.exp() * reward).sum()) == pytest.approx(-34.9, abs=0.2)  # theirs by sampling
    assert 1 / (cell * float((target.exp() * reward.exp()).sum())) == pytest.approx(0.276, abs=1e-3)


def test_the_reward_of_a_config_is_the_log_ratio() -> None:
    """What configs write with `rewards.density` is the reward whose posterior `posterior` is."""
    reward: Any = build(EXAMPLE, "reward")
    made = GMM()
    x = made.mixture.sample(50, torch.Generator().manual_seed(0))
    expected = made.posterior().log_prob(x) - made.mixture.log_prob(x)
    assert_close(reward(x, [""] * 50), expected, rtol=1e-9, atol=1e-9)


def test_a_floor_of_the_reward_does_not_move_the_posterior() -> None:
    """E_p[exp(max(r, low))] is the new Z: it exceeds 1 by less than exp(low), by quadrature over the plane."""
    made, low = GMM(), -8.0
    posterior = made.posterior()
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    prior = made.mixture.log_prob(x)
    clamped = (posterior.log_prob(x) - prior).clamp(min=low)
    z = float(axis[1] - axis[0]) ** 2 * float((prior + clamped).exp().sum())
    assert 0 < z - 1 < math.exp(low)
    target = made.exact_target(build({"component": "clamp", "low": low, "reward": EXAMPLE}, "reward"), 1.0)
    assert target.modes is not None
    assert_close(target.modes.weights, posterior.weights)
    assert target.log_z == 0


@pytest.mark.parametrize(
    ("reward", "beta", "message"),
    [
        (EXAMPLE, 2.0, "beta is 2"),
        (
            {"component": "clamp", "low": -5.0, "reward": EXAMPLE},
            1.0,
            "clamped to -5.0 … None, which moves the posterior",
        ),
        ({"component": "clamp", "low": -10.0, "high": 1.0, "reward": EXAMPLE}, 1.0, "clamped to -10.0 … 1.0"),
        ({"component": "brightness"}, 1.0, "no ratio of two densities"),
    ],
)
def test_unknown_posteriors_are_refused(reward: dict[str, Any], beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GMM().exact_target(build(reward, "reward"), beta)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_replay_is_the_rollout_and_both_are_the_papers_sampler(scheduler: str, dtype: str) -> None:
    made = attached(scheduler=scheduler, dtype=dtype)
    perturb(made)
    trajectory = drawn(made)
    assert torch.equal(score(made, [""] * 5, trajectory), trajectory.log_prob)  # parity 0
    found, x = log_p(made, trajectory), trajectory.x.double()
    denoiser = made.pipe.denoiser
    alpha_bar = made.schedule.alpha_bar(8).tolist()
    for i, (by_x, by_noise, std) in enumerate(sampler_formula(scheduler, alpha_bar)):
        now = torch.tensor(alpha_bar[8 - i], dtype=denoiser.dtype)
        mean = by_x * x[:, i] + by_noise * denoiser.noise(trajectory.x[:, i], now).double()
        if std > 1e-6:
            # Stock schedulers keep alpha_bar in float32: 1e-6 of a mean is 1e-3 nats at the last, smallest deviation.
            expected = Normal(mean, std).log_prob(x[:, i + 1]).sum(1)
            assert_close(found[:, i], expected, rtol=5e-3, atol=5e-3)


def test_importance_weights_of_the_truth_agree_with_quadrature() -> None:
    """log Z of the *discrete* chain, in one dimension, through every part: sampler, recorder, replay, decode, reward."""
    means, weights, target = [[-3.0], [0.0], [4.0]], [0.3, 0.4, 0.3], [0.6, 0.1, 0.3]
    made = GMM(means, weights, 0.3, steps=12, dtype="float64")
    posterior = made.posterior(means, target)
    denoiser, alpha_bar = made.pipe.denoiser, made.schedule.alpha_bar(12).tolist()
    data = made.decode(GRID[:, None])
    reward = posterior.log_prob(data) - made.mixture.log_prob(data)
    mixture = (denoiser.centres, made.mixture.weights, denoiser.spread)
    expected = chain_log_z(sampler_formula("DDIMScheduler", alpha_bar), alpha_bar, mixture, reward)
    with made.as_exact(posterior):
        trajectory = drawn(made, 3000)
    log_w = log_reward(made, posterior, trajectory) - (trajectory.log_prob - log_p(made, trajectory)).sum(1)
    w = (log_w - log_w.max()).exp()
    error = float(w.std() / w.mean()) / math.sqrt(3000)
    assert error < 0.05
    assert float(log_w.logsumexp(0)) - math.log(3000) == pytest.approx(expected, abs=4 * error)


def test_the_truth_through_the_default_chain_is_nearly_the_posterior() -> None:
    """The row "truth" of a comparison: what 100 steps of fixed variance cost, without any learning.

    1,500 samples: the floor of TV, 1,500 exact samples against the weights, is 0.03; the ELBO's standard error is 0.01.
    """
    made = GMM()
    posterior = made.posterior()
    with made.as_exact(posterior):
        trajectory = drawn(made, 1500)
    shares = posterior.shares(made.decode(trajectory.x_0))
    assert 0.5 * float((shares[:-1] - posterior.weights).abs().sum() + shares[-1]) < 0.05
    assert float(shares[-1]) < 0.005
    elbo = float(
        (log_reward(made, posterior, trajectory) - (trajectory.log_prob - log_p(made, trajectory)).sum(1)).mean()
    )
    assert -0.08 < elbo < 0.0


def test_as_exact_is_the_denoiser_of_the_posterior_and_ends() -> None:
    made = attached()
    perturb(made)
    before = drawn(made)
    posterior = made.posterior([[2.0, 0.0]], [1.0])
    with made.as_exact(posterior):
        x = made.decode(drawn(made, 200).x_0)
    assert posterior.shares(x)[1] > 0.97
    other = GMM(**TWO | SMALL | {"weights": [1e-9, 1 - 1e-9]})
    with made.as_exact(made.posterior([[-2.0, 1.0], [2.0, 0.0]], [1e-9, 1 - 1e-9])):
        predicted = made.pipe.denoiser(torch.zeros(1, 2), torch.tensor(3))
    expected = made.mixture.weighted(TWO["means"], [1e-9, 1 - 1e-9]).weights  # the prior keeps its own shift and scale
    assert_close(expected, other.mixture.weights)
    density = noised_mixture(
        made.pipe.denoiser.centres.double(),
        expected,
        float(made.pipe.denoiser.spread),
        float(made.pipe.denoiser.alpha_bar[3]),
    )
    score_there = score_by_autograd(density, torch.zeros(1, 2, dtype=torch.float64))
    assert_close(
        predicted.double(), -math.sqrt(1 - float(made.pipe.denoiser.alpha_bar[3])) * score_there, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(KeyError), made.as_exact(posterior):
        raise KeyError
    assert torch.equal(drawn(made).x, before.x)


def test_it_is_a_prior() -> None:
    made = two()
    assert isinstance(made, Prior)
    assert (made.dims, made.parameters()) == ((2,), {})
    assert made.arguments([""]) == {"batch_size": 1, "num_inference_steps": 8, "eta": 1.0}
    assert short_names("prior")["gmm"] == "pipelines.gmm:GMM"
    trained = json.loads(json.dumps(attached().fingerprint()))
    check_compatible(trained, attached().fingerprint())
    with pytest.raises(CheckpointError, match=r"adapter\.width: 16 in the checkpoint, 8 now"):
        check_compatible(trained, attached(width=8).fingerprint())


def test_posterior_starts_as_the_prior_and_can_be_switched_off() -> None:
    made = two()
    state = torch.get_rng_state()
    before = drawn(made)
    made.attach(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(made).x, before.x)
    perturb(made)
    after = drawn(made)
    assert not torch.allclose(after.x, before.x, atol=1e-3)
    with made.as_prior():
        assert torch.equal(drawn(made).x, before.x)
    assert torch.equal(drawn(made).x, after.x)


def test_the_seed_decides_the_network() -> None:
    one, same, other = (two() for _ in range(3))
    for made, seed in ((one, 1), (same, 1), (other, 2)):
        made.attach(seed=seed)
    weights = [made.parameters()["layers.0.weight"] for made in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_correction_moves_the_mean_in_standard_deviations() -> None:
    """mean_q - mean_p = std·u at every step, whatever the scheduler: the scale that one learning rate fits."""
    for scheduler in ("DDIMScheduler", "DDPMScheduler"):
        made = attached(scheduler=scheduler, dtype="float64")
        perturb(made)
        trajectory, denoiser, steps = drawn(made), made.pipe.denoiser, made.coefficients
        for i, t in enumerate(steps.timesteps):
            x_t, timestep = trajectory.x[:, i], torch.tensor(t)
            with made.as_prior():
                prior = denoiser(x_t, timestep)
            moved = steps.by_noise[i] * (denoiser(x_t, timestep) - prior)
            assert_close(moved, steps.std[i] * denoiser.corrected(x_t, timestep, prior), rtol=1e-6, atol=1e-9)


def test_the_network_sees_where_the_prior_thinks_a_state_comes_from() -> None:
    """With noise so small that every state shows its mode, E[x_0 | x_t] is x_t pulled towards that mode; by Tweedie's formula."""
    made = attached(dtype="float64")
    perturb(made)
    denoiser, timestep = made.pipe.denoiser, torch.tensor(4)
    seen: list[Tensor] = []
    denoiser.correction.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    x_t = torch.randn(6, 2, dtype=torch.float64)
    denoiser(x_t, timestep)
    alpha_bar = float(denoiser.alpha_bar[4])
    density = noised_mixture(denoiser.centres, made.mixture.weights, float(denoiser.spread), alpha_bar)
    expected = (x_t + (1 - alpha_bar) * score_by_autograd(density, x_t)) / math.sqrt(alpha_bar)
    assert_close(seen[0], expected, rtol=1e-6, atol=1e-8)


def test_the_reach_of_a_posterior_adds_up_to_what_a_mode_tells() -> None:
    """The squares of the reaches sum to twice the entropy of the mode, 2·log 25 nats, where modes are points.

    That is the integral of the least squared error over the signal-to-noise ratio (Guo, Shamai, Verdú 2005,
    https://arxiv.org/abs/cs/0412108). 200 steps overrate it a little, each of them with the error at its noisy end.
    """
    denoiser = GMM(variance=1e-3, steps=200).pipe.denoiser
    assert 2 * float(denoiser.reach.square().sum()) == pytest.approx(2 * math.log(25), rel=0.04)


def test_gradients_are_those_of_the_whole_graph() -> None:
    """Backward inside each step against autograd through all steps at once."""
    made = attached(dtype="float64")
    perturb(made)
    trajectory, call = drawn(made), made.arguments([""] * 5)
    cotangent = torch.randn(5, 8, dtype=torch.float64)
    replay_backward(made.pipe, trajectory, cotangent, dtype=torch.float64, **call)
    inside = {name: parameter.grad for name, parameter in made.parameters().items()}
    steps, denoiser = made.coefficients, made.pipe.denoiser
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(steps.timesteps):
        mean = steps.by_x[i] * trajectory.x[:, i] + steps.by_noise[i] * denoiser(trajectory.x[:, i], torch.tensor(t))
        total = total + cotangent[:, i] @ Normal(mean, steps.std[i]).log_prob(trajectory.x[:, i + 1]).sum(1)
    expected = torch.autograd.grad(total, list(made.parameters().values()))
    for (name, found), gradient in zip(inside.items(), expected, strict=True):
        assert found is not None, name
        assert_close(found, gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("shapes_unchecked")
def test_training_moves_the_weights() -> None:
    """40 updates of VarGrad, half of each batch prior trajectories re-sampled by exp(r), from weights 0.4 : 0.6 to 0.85 : 0.15."""
    # Two modes part at a lower signal-to-noise ratio than 25, so the steps are spread evenly.
    made = GMM(**TWO, steps=20, width=32, layers=2, frequencies=3, schedule={"centre": 0.0, "width": 2.0})
    made.attach(seed=0)
    posterior, half = made.posterior(TWO["means"], [0.85, 0.15]), 96
    with made.as_prior():
        held = rollout(made, [""] * 400, range(400))
    chance = log_reward(made, posterior, held).exp()
    optimizer = torch.optim.Adam(made.parameters().values(), lr=0.015, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    call = made.arguments([""] * 2 * half)
    for iteration in range(40):
        own = rollout(made, [""] * half, range(1000 + half * iteration, 1000 + half * (iteration + 1)))
        resampled = systematic_resample(chance, half, float(torch.rand(())))
        trajectory = Trajectory.cat([own, held[resampled]])
        log_q = score(made, [""] * 2 * half, trajectory)
        terms = make_terms(log_q, log_p(made, trajectory), log_reward(made, posterior, trajectory), x=trajectory.x)
        RTB("vargrad")(terms, 1.0).loss.backward()
        assert terms.log_q.grad is not None
        optimizer.zero_grad()
        replay_backward(made.pipe, trajectory, terms.log_q.grad, dtype=torch.float64, **call)
        optimizer.step()
        schedule.step()
    trajectory = drawn(made, 1000)
    weight = log_reward(made, posterior, trajectory) - (trajectory.log_prob - log_p(made, trajectory)).sum(1)
    # 0 is log Z; the exact denoiser has -0.12 through this chain, and the prior has E_p[r], far below.
    assert float(weight.mean()) > -0.17
    # From 0.4. Chains of fixed variance that are best in KL steer a little less than all the way: 0.73 was measured.
    assert 0.68 < float(posterior.shares(made.decode(trajectory.x_0))[0]) < 0.92


def test_a_saved_posterior_is_the_same_after_loading(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    from pipelines._analytic.mixture_denoiser import MixtureDenoiser
    from pipelines._analytic.pipeline import VectorPipeline

    made = attached()
    perturb(made)
    made.export(tmp_path, "card")
    denoiser = MixtureDenoiser.from_pretrained(tmp_path, subfolder="denoiser")
    pipe = VectorPipeline(denoiser, DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler"))
    call = made.arguments([""] * 4)
    drawn_by = [p(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0] for p in (pipe, made.pipe)]
    assert_close(drawn_by[0], drawn_by[1], rtol=1e-5, atol=1e-5)  # kernels round by how weights lie in memory
    other = attached()
    load_parameters(other, made.parameters())
    assert torch.equal(drawn(other).x, drawn(made).x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [0.4, 0.4]}, r"sum to 0.8 instead of 1; divided by it they are \[0.500000, 0.500000\]"),
        ({"weights": [1.5, -0.5]}, "must not be negative"),
        ({"weights": [math.nan, 1.0]}, "weights is .* every number must be finite"),
        ({"weights": [1.0]}, "2 means and 1 weights: give one weight per mean"),
        ({"weights": [0.0, 0.0]}, "sum to 0 instead of 1"),
        ({"variance": 0.0}, "positive and finite"),
        ({"variance": -0.3}, "positive and finite"),
        ({"means": []}, r"means has the shape \(0,\): it must be a list of lists"),
        ({"means": [[0.0, 1.0], [0.0]]}, "equal length"),
        ({"means": [[0.0, math.inf], [0.0, 1.0]]}, "every number must be finite"),
        ({"width": 0}, "at least 1"),
        ({"scheduler": "DDIM"}, "Choose one of"),
        ({"eta": -0.1}, r"outside \[0, 1\]"),
        ({"schedule": {"center": 1.0}}, "Did you mean 'centre'"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe({"component": "gmm"} | TWO | settings, "prior")
    with pytest.raises(ValueError, match=message):
        GMM(**TWO | settings)


def test_rounded_weights_are_taken() -> None:
    assert two(weights=[0.33334, 0.66667]).mixture.weights.sum() == 1


@pytest.mark.parametrize(
    ("modes", "weights", "message"),
    [
        ([[0.0, 1.0]], [1.0], "is no mode of the prior"),
        ([[2.0, 0.0]], [0.7], "sum to 0.7"),
        ([[2.0, 0.0], [2.0, 0.0]], [0.5, 0.5], "a point twice"),
        ([[2.0, 0.0], [-2.0, 1.0]], [1.2, -0.2], "must not be negative"),
        ([[2.0]], [1.0], "one point of 2 numbers"),
        ([], [], "empty"),
    ],
)
def test_impossible_posteriors_are_refused(modes: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two().posterior(modes, weights)


def test_the_example_posterior_belongs_to_the_example() -> None:
    with pytest.raises(ValueError, match="is no mode of the prior"):
        two().posterior()
    with pytest.raises(ValueError, match="other modes than the prior"), two().as_exact(GMM().posterior()):
        pass
