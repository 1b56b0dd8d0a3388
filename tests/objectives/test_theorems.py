"""The identities behind the objectives, on a linear-Gaussian prior: stock scheduler, ordinary recorder, network parameters.

`tests/objectives/test_objectives.py` has them for arbitrary small tensors; here they hold for what the trainer
really computes. Tolerances:
everything is float64 (`dtype: float64`); a trajectory's log-densities are sums of some 30 terms up to 1e2 nats, good to 1e-12 of
their sizes through the matrix inverses of the closed form, so 1e-8 leaves two digits and more. Averages over draws are held to 5
standard errors of every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.chain.normal import gaussian_kl
from diffusion_rtb.chain.rollout import replay_backward, rollout, score_with_means
from diffusion_rtb.interfaces import Objective, Terms
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.sampling.batch import Batch
from pipelines._analytic.linear_gaussian import AffineChain, Tilt, kl
from pipelines.gaussian import Gaussian
from tests.oracles.analytic import Joint
from tests.oracles.behaving import gradient_of
from tests.oracles.terms import at

STEPS, BETA, CHANCE = 6, 1.5, 5.0
LINEAR: dict[str, Any] = {"linear": [0.7, -0.4]}
QUADRATIC: dict[str, Any] = {"mean": [1.0, 0.5], "precision": [[0.8, 0.2], [0.2, 0.5]]}

exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def gaussian() -> Gaussian:
    prior = Gaussian([0.5, -1.0], [[1.0, 0.3], [0.3, 0.6]], steps=STEPS, dtype="float64")
    prior.attach()
    return prior


def moved(prior: Gaussian, size: float = 0.1) -> Gaussian:
    """The posterior somewhere that is neither the prior nor the optimum."""
    generator = torch.Generator().manual_seed(4)
    for parameter in prior.parameters().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return prior


def terms_of(drawn: Batch) -> Terms:
    assert drawn.log_q is not None
    assert drawn.log_p is not None
    trajectory = drawn.trajectory
    return Terms(
        log_q=drawn.log_q.detach().clone().requires_grad_(),
        log_p=drawn.log_p,
        reward=drawn.reward.double(),
        prompt=drawn.prompt,
        x=trajectory.x,
        timesteps=trajectory.timesteps,
        features=torch.ones(len(drawn), 1, dtype=torch.float64),
        log_behaviour=trajectory.drawn_with,
        kl=None if drawn.kl is None else drawn.kl.detach().clone().requires_grad_(),
    )


def by_parameters(prior: Gaussian, drawn: Batch, objective: Objective, beta: float = BETA) -> tuple[float, Tensor]:
    """Loss and gradient of the network's parameters, pushed through the recorder as the trainer does."""
    for parameter in prior.parameters().values():
        parameter.grad = None
    terms = terms_of(drawn)
    answer = objective(terms, beta)
    answer.loss.backward()
    assert terms.log_q.grad is not None
    replay_backward(
        prior.pipe,
        drawn.trajectory,
        terms.log_q.grad,
        kl_cotangent=None if terms.kl is None else terms.kl.grad,
        mean_p=drawn.mean_p,
        dtype=torch.float64,
        **prior.arguments([""] * len(drawn)),
    )
    return float(answer.loss.detach()), gradient_of(prior)


Source = Literal["posterior", "prior", "explored"]


def draw(
    prior: Gaussian, reward: dict[str, Any], source: Source, count: int, *, seed: int = 0, with_kl: bool = False
) -> Batch:
    """Recorded trajectories with everything the trainer would fill in."""
    prompts, seeds = [""] * count, [seed * 1_000_000 + k for k in range(count)]
    widen: Callable[[float], float] | None = (lambda std: 1.7) if source == "explored" else None
    with prior.as_prior() if source == "prior" else nullcontext():
        trajectory = rollout(prior, prompts, seeds, noise_scale=widen)
    log_q, _, mean_q = score_with_means(prior, prompts, trajectory)
    with prior.as_prior():
        log_p, _, mean_p = score_with_means(prior, prompts, trajectory)
    steps = [gaussian_kl(mean_q[:, i], mean_p[:, i], float(trajectory.std[i]), torch.float64) for i in range(STEPS)]
    return Batch(
        trajectory=trajectory,
        prompt=torch.zeros(count, dtype=torch.long),
        reward=prior.reward(**reward)(trajectory.x_0),
        log_q=log_q,
        log_p=log_p,
        mean_p=mean_p if with_kl else None,
        kl=torch.stack(steps, dim=1) if with_kl else None,
    )


@pytest.mark.parametrize("kind", ["vargrad", "learned"])
def test_trust_pcl_is_alpha_squared_rtb(kind: Any) -> None:
    """Loss and gradient of the network, on anyone's trajectories."""
    prior = moved(gaussian())
    for source in get_args(Source):
        drawn = draw(prior, QUADRATIC, source, 8)
        rtb, trust_pcl = RTB(kind).double(), TrustPCL(log_z=kind).double()
        loss, gradient = by_parameters(prior, drawn, rtb)
        own_loss, own_gradient = by_parameters(prior, drawn, trust_pcl)
        alpha = 1 / BETA
        assert own_loss == pytest.approx(alpha**2 * loss, rel=1e-10)
        exact(own_gradient, alpha**2 * gradient)


def test_vargrad_is_rtb_at_the_log_z_of_least_loss() -> None:
    """Found by search and not as a mean: a parabola through three points has its minimum where it has it."""
    prior = moved(gaussian())
    drawn = draw(prior, QUADRATIC, "explored", 16)
    loss = {z: by_parameters(prior, drawn, at(RTB("learned"), [z]))[0] for z in (-1.0, 0.0, 1.0)}
    curvature, slope = loss[1.0] + loss[-1.0] - 2 * loss[0.0], (loss[1.0] - loss[-1.0]) / 2
    best = at(RTB("learned"), [-slope / curvature])
    least, gradient = by_parameters(prior, drawn, best)
    vargrad, own = by_parameters(prior, drawn, RTB())
    assert vargrad == pytest.approx(least, rel=1e-10)
    exact(own, gradient)
    assert least < min(loss.values())


@pytest.mark.parametrize("source", ["posterior", "prior", "explored"])
def test_the_residual_is_zero_on_every_trajectory_at_the_posterior(source: Source) -> None:
    """A linear reward's posterior is a chain of the prior's variances; log Z by the joint Normal of the trajectory, no recursion.

    x_T is independent of x_0 up to what the schedule leaves, so log F(x_T) and not log Z is what a trajectory has.
    """
    prior = gaussian()
    tilt = prior.solve(BETA, **LINEAR)
    prior.set_posterior(tilt.posterior)
    drawn = draw(prior, LINEAR, source, 12)
    terms = terms_of(drawn)
    log_f = tilt.log_f[0](terms.x[:, 0])
    residual = RTB("learned")
    for i in range(12):
        one = terms_of(drawn[slice(i, i + 1)])
        found = at(residual, [float(log_f[i])])(one, BETA).residual
        exact(found, torch.zeros(1, dtype=torch.float64))
    joint = Joint.of(tilt.p, tilt.beta_r)
    assert float(log_f[0]) == pytest.approx(joint.log_f(0, terms.x[0, 0].numpy()), abs=1e-8)
    # What is left between log F(x_T) and log Z is the memory of the chain: the residual of RTB's single log Z.
    assert float((at(RTB("learned"), [joint.log_z()])(terms, BETA).residual + log_f - joint.log_z()).abs().max()) < 1e-8


class ClosedForm(nn.Module):
    """The exact V in the place of a value network."""

    def __init__(self, tilt: Tilt, timesteps: Tensor, beta: float) -> None:
        super().__init__()
        self.tilt, self.timesteps, self.beta = tilt, timesteps.tolist(), beta

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        value = torch.zeros(len(x), dtype=x.dtype)
        for i, step in enumerate(self.timesteps):
            value = torch.where(t == step, self.tilt.log_f[i](x) / self.beta, value)
        return value


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("source", ["posterior", "prior", "explored"])
def test_stretches_are_consistent_at_the_closed_form_value(length: int, source: Source) -> None:
    """Every d that divides the trajectory, loss and all: mean of 1/2 residual² over stretches."""
    prior = gaussian()
    tilt = prior.solve(BETA, **LINEAR)
    prior.set_posterior(tilt.posterior)
    terms = terms_of(draw(prior, LINEAR, source, 12))
    objective = TrustPCL(length)
    objective.value = ClosedForm(tilt, terms.timesteps, BETA)
    answer = objective(terms, BETA)
    assert float(answer.loss.detach()) < 1e-16  # half the square of 1e-8
    exact(answer.residual, torch.zeros(12, dtype=torch.float64))


def test_stretches_are_consistent_for_a_quadratic_reward_too() -> None:
    """Its posterior has variances of its own, so log_q is that of the closed-form chain on recorded prior trajectories."""
    prior = gaussian()
    tilt = prior.solve(BETA, **QUADRATIC)
    terms = terms_of(draw(prior, QUADRATIC, "prior", 12))
    terms = replace(terms, log_q=tilt.posterior.log_prob(terms.x).requires_grad_())
    for length in (1, 2, 3, 6):
        objective = TrustPCL(length)
        objective.value = ClosedForm(tilt, terms.timesteps, BETA)
        exact(objective(terms, BETA).residual, torch.zeros(12, dtype=torch.float64))
        assert float(objective(terms, BETA).loss.detach()) < 1e-16


def exact_gradient(prior: Gaussian, reward: dict[str, Any]) -> Tensor:
    """Gradient of KL(q || p·exp(beta·r)) = KL(q || p) - beta·E_q[r] + log Z, through the moments of the chain, by autograd."""
    tilt = prior.solve(BETA, **reward)
    std = prior.coefficients.std
    leaves = {name: p.detach().clone().requires_grad_() for name, p in prior.parameters().items()}
    # As `set_posterior` writes them: in units of the step's deviation, by timestep.
    A = tilt.p.A + std[:, None, None] * leaves["slope"].flip(0)
    b = tilt.p.b + std[:, None] * leaves["offset"].flip(0)
    q = AffineChain(A, b, tilt.p.C)
    means, covs = q.marginals
    loss = kl(q, tilt.p).sum() - tilt.beta_r.expectation(means[-1], covs[-1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])


@pytest.fixture(scope="module")
def on_policy() -> tuple[Gaussian, list[Batch]]:
    """48 batches of 256 of the posterior's own trajectories, with the closed-form KL."""
    prior = moved(gaussian())
    return prior, [draw(prior, QUADRATIC, "posterior", 256, seed=seed, with_kl=True) for seed in range(48)]


@pytest.mark.parametrize(
    ("objective", "scale"),
    [
        (RTB("learned"), 1.0),
        (RTB(), 255 / 256),
        (ReinforceKL(), BETA),
        (GRPO(normalise="none"), BETA),
        (GRPO("gaussian", normalise="none"), BETA),
        (DPOK("gaussian"), BETA),
    ],
    ids=["rtb-learned", "vargrad", "reinforce_kl", "grpo", "grpo-gaussian", "dpok-gaussian"],
)
def test_on_policy_gradient_is_that_of_the_kl_to_the_posterior(
    objective: Any, scale: float, on_policy: tuple[Gaussian, list[Batch]]
) -> None:
    """E[gradient of the loss] = grad KL(q || posterior), over beta where the loss is in reward units; for RTB whatever log Z is.

    V and log Z are what they are, set once: any baseline that does not follow from the batch will do.
    """
    prior, batches = on_policy
    truth = exact_gradient(prior, QUADRATIC)
    objective.prepare(1, (2,), 1)
    objective = (
        at(objective, [0.7]) if isinstance(objective, RTB) and list(objective.parameters()) else objective.double()
    )
    if isinstance(objective, DPOK):
        objective(terms_of(batches[0]), BETA)  # sets V to the mean of the first batch
        assert objective.value is not None
        nn.init.normal_(objective.value.output.weight)  # type: ignore[union-attr, arg-type]
    uses_kl = bool(getattr(objective, "uses_kl", False))
    drawn = [batch if uses_kl else replace(batch, kl=None, mean_p=None) for batch in batches]
    gradients = torch.stack([by_parameters(prior, batch, objective)[1] for batch in drawn])
    if isinstance(objective, RTB) and not list(objective.parameters()):
        truth = scale * truth
    else:
        gradients = scale * gradients
    error = gradients.std(0) / len(gradients) ** 0.5
    assert float(((gradients.mean(0) - truth) / error).abs().max()) < CHANCE
    assert float(truth.norm()) > 5 * float(error.norm())  # there is something to be seen


def test_the_best_chain_is_where_the_exact_gradient_vanishes_and_dpoks_does_not() -> None:
    """For a quadratic reward the KL still to be paid depends on the state: without it DPOK goes past the best chain."""
    prior = gaussian()
    tilt = prior.solve(BETA, **QUADRATIC)
    prior.set_posterior(tilt.best)
    assert float(exact_gradient(prior, QUADRATIC).abs().max()) < 1e-8
    drawn = [draw(prior, QUADRATIC, "posterior", 256, seed=seed, with_kl=True) for seed in range(24)]
    found = {}
    for name in ("gaussian", "gaussian_loss"):
        objective = DPOK(name)
        objective.value = Zero()
        gradients = torch.stack([by_parameters(prior, batch, objective)[1] for batch in drawn])
        found[name] = float((gradients.mean(0) / (gradients.std(0) / 24**0.5)).abs().max())
    assert found["gaussian"] < CHANCE
    assert found["gaussian_loss"] > CHANCE


class Zero(nn.Module):
    """No baseline at all."""

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=x.dtype)
