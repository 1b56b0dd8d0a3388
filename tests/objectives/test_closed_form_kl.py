"""The closed-form KL of each transition: its value, its gradient inside the step, and its way through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from diffusion_rtb.chain.normal import gaussian_kl
from diffusion_rtb.chain.rollout import replay_backward, rollout, score_with_means
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Loss, Terms
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    prior = StableDiffusion(str(save_tiny(tmp_path_factory.mktemp("tiny"))), device="cpu", steps=4)
    prior.attach(rank=2, alpha=2.0, target_modules=["to_v"], seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return prior


def test_the_kl_is_that_of_torch_distributions() -> None:
    mean_q, mean_p = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    expected = kl_divergence(Normal(mean_q, 0.3), Normal(mean_p, 0.3)).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean_q, mean_p, 0.3, torch.float64), expected)


def test_means_reproduce_the_log_density(prior: StableDiffusion) -> None:
    trajectory = rollout(prior, PROMPTS, [1, 2])
    log_prob, _, means = score_with_means(prior, PROMPTS, trajectory)
    assert torch.equal(log_prob, trajectory.log_prob)
    std = trajectory.std.double().view(1, -1, 1, 1, 1)
    expected = Normal(means.double(), std).log_prob(trajectory.x[:, 1:].double()).flatten(2).sum(2)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=2e-3)


def test_its_gradient_is_that_of_finite_differences(prior: StableDiffusion) -> None:
    trajectory = rollout(prior, PROMPTS, [1, 2])
    with prior.as_prior():
        _, _, mean_p = score_with_means(prior, PROMPTS, trajectory)
    weights = torch.tensor([[1.0, 0.5, 2.0, 0.3], [0.2, 1.0, 0.7, 1.5]]).double()
    parameters = list(prior.parameters().values())

    def total() -> float:
        _, _, mean_q = score_with_means(prior, PROMPTS, trajectory)
        kl = [gaussian_kl(mean_q[:, i], mean_p[:, i], float(trajectory.std[i]), torch.float64) for i in range(4)]
        return float((weights * torch.stack(kl, 1)).sum())

    for parameter in parameters:
        parameter.grad = None
    zero = torch.zeros_like(weights)
    call: dict[str, Any] = prior.arguments(PROMPTS)
    replay_backward(prior.pipe, trajectory, zero, kl_cotangent=weights, mean_p=mean_p, dtype=torch.float64, **call)
    gradient = [p.grad.clone() for p in parameters if p.grad is not None]
    direction = [g / torch.cat([g.flatten() for g in gradient]).norm() for g in gradient]
    slope = float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)))
    values = []
    for step in (1e-2, -2e-2, 1e-2):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data.add_(step * d)
        values.append(total())
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=2e-2)
    assert slope > 1e-3


class KlOnly(nn.Module):
    """Asks for the closed-form KL and pulls q back to p; remembers what it was given."""

    uses_kl = True

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def forward(self, terms: Terms, beta: float) -> Loss:
        assert terms.kl is not None
        self.seen = terms
        loss = terms.kl.sum(1).mean() + 0 * terms.log_q.sum()
        zero = torch.zeros(len(terms.reward))
        return Loss(loss, zero, zero)


def config(folder: Path, out: Path, **objective: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "kl",
            "out": str(out),
            "prior": {"component": "stable_diffusion", "path": str(folder), "steps": 4, "device": "cpu"},
            "posterior": {"rank": 2, "alpha": 2.0, "target_modules": ["to_v"]},
            "reward": {"component": "jpeg"},
            "beta": 1.0,
            "objective": objective,
            "prompts": {"list": PROMPTS},
            "train": {
                "prompts_per_iteration": 2,
                "group": 2,
                "micro_batch": 4,
                "iterations": 12,
                "grid_every": 0,
                "lr": 0.02,
            },
        }
    )


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_trainer_hands_it_over_and_lowers_it(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    trainer = assemble(config(folder, tmp_path / "runs", component="tests.objectives.test_closed_form_kl:KlOnly"))
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.prior.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trainer.step()
    assert isinstance(trainer.objective, KlOnly)
    before = trainer.objective.seen.kl
    assert before is not None
    for trainer.iteration in range(1, 12):
        trainer.step()
    after = trainer.objective.seen.kl
    assert after is not None
    assert float(after.sum(1).mean()) < 0.5 * float(before.sum(1).mean())


def test_kl_of_an_experience_is_its_expected_log_ratio(prior: StableDiffusion) -> None:
    """E over x_s of log_q - log_p is the KL: the average over many re-draws of one transition."""
    sampler = Sampler(prior, lambda images, prompts: images.mean((1, 2, 3)), PROMPTS, 64)
    drawn = sampler.draw([0] * 256, list(range(256)))
    complete: Batch = sampler.with_kl(drawn)
    assert complete.kl is not None
    assert complete.log_q is not None
    assert complete.log_p is not None
    ratio: Tensor = complete.log_q - complete.log_p
    difference = (ratio - complete.kl).sum(1)
    error = float(difference.std()) / 16
    assert abs(float(difference.mean())) < 4 * error  # a martingale difference: mean 0
    assert float(complete.kl.sum(1).mean()) > 0
