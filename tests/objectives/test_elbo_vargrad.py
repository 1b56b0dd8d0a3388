"""VarGrad on samples: its estimate of log q - log p, its gradient, and its bias, by identities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_rtb.interfaces import Samples
from diffusion_rtb.objectives.elbo_vargrad import ElboVarGrad
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.noising import noised_anew
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.regression import Regression
from tests.oracles.behaving import run


def estimating(out: Path, **objective: int) -> Trainer:
    train = {"group": 64, "micro_batch": 32}
    trainer = run(out, objective={"component": "elbo_vargrad", **objective}, train=train)
    torch.manual_seed(0)
    for parameter in trainer.prior.parameters().values():
        parameter.data.normal_().mul_(0.3)
    return trainer


class Reading(ElboVarGrad):
    """Keeps what it was told."""

    def weights(self, samples: Samples, beta: float) -> torch.Tensor:
        self.told = samples
        return super().weights(samples, beta)


def bounds(trainer: Trainer, parts: dict[str, Batch], seed: int, count: int | None = None) -> torch.Tensor:
    reading = Reading()
    Regression(trainer.sampler, reading, 1.3, {"prior": trainer.prior.as_prior}).push(parts, count, seed)
    assert reading.told.log_ratio is not None
    return reading.told.log_ratio


def test_the_estimate_is_the_log_ratio_of_forward_chains(tmp_path: Path, shapes_unchecked: None) -> None:
    """For one x_0: E[l] is E[log q - log p] of its forward chains, of which it averages each x_s; with fewer steps too."""
    trainer = estimating(tmp_path)
    dict(trainer.prior.parameters())["slope"].data.zero_()
    dict(trainer.prior.parameters())["offset"].data.fill_(0.5)
    one = trainer.sampler.draw([0], [3])
    many = Batch.cat([one] * 512)
    chains = trainer.sampler.completed(noised_anew(trainer.sampler, many, 5))
    assert chains.log_q is not None
    assert chains.log_p is not None
    exact = (chains.log_q - chains.log_p).sum(1)
    for count in (None, 2):
        found = bounds(trainer, {"posterior": many}, 7, count)
        error = float((found.var() / 512 + exact.var() / 512).sqrt())
        assert abs(float(found.mean() - exact.mean())) < 4 * error
    assert abs(float(exact.mean())) > 4 * error  # it would be seen to miss


def test_the_gradient_is_that_of_the_variance(tmp_path: Path, shapes_unchecked: None) -> None:
    """Of mean d²/2 with the noise held, by differences along a random direction."""
    trainer = estimating(tmp_path)
    parts = trainer.sources.draw(trainer.sampler, [0], 0, 1.3)
    regression = Regression(trainer.sampler, ElboVarGrad(), 1.3, {"prior": trainer.prior.as_prior})
    regression.push(parts, None, 7)
    parameters = list(trainer.prior.parameters().values())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    found = []
    for h in (1e-2, -1e-2):
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.add_(along, alpha=h)
        d = bounds(trainer, parts, 7) - 1.3 * parts["posterior"].reward
        found.append(float(d.var(correction=0)) / 2)
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.sub_(along, alpha=h)
    assert slope == pytest.approx((found[0] - found[1]) / 2e-2, rel=2e-3)


def test_equal_samples_show_the_bias(tmp_path: Path, shapes_unchecked: None) -> None:
    """Of one x_0 in all places only the noise of l is left to learn from: the loss is its variance, less near the prior."""
    trainer = estimating(tmp_path)
    parts = {"posterior": Batch.cat([trainer.sampler.draw([0], [3])] * 64)}
    variance = float(bounds(trainer, parts, 7).var())
    assert variance > 0.1
    for parameter in trainer.prior.parameters().values():
        parameter.data.mul_(0.5)
    assert float(bounds(trainer, parts, 7).var()) < 0.5 * variance


def test_the_reference_may_follow(tmp_path: Path, shapes_unchecked: None) -> None:
    """Right after a refresh l is 0."""
    trainer = estimating(tmp_path / "moving", refresh=2)
    assert trainer.updates.old is not None
    trainer.updates.settle(0)
    parts = trainer.sources.draw(trainer.sampler, [0], 0, 1.3)
    reading = Reading(2)
    networks = trainer.updates._networks()
    Regression(trainer.sampler, reading, 1.3, networks).push(parts, None, 7)
    assert reading.told.log_ratio is not None
    assert float(reading.told.log_ratio.abs().max()) > 0.1
    trainer.updates.settle(1)
    Regression(trainer.sampler, reading, 1.3, networks).push(parts, None, 7)
    torch.testing.assert_close(reading.told.log_ratio, torch.zeros(64, dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="at least 1, or null for the prior; got 0"):
        ElboVarGrad(refresh=0)
