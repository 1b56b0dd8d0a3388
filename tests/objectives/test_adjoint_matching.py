"""Adjoints against autograd through the whole chain, and their targets against chains whose posterior is known in closed form."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.interfaces import AimsStates
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.adjoint import with_adjoint
from diffusion_rtb.training.updates.pathwise import Pathwise
from diffusion_rtb.training.updates.regression import Regression
from tests.objectives.test_reward_backprop import disturb, gradients
from tests.oracles.behaving import BETA, QUADRATIC, begin_at_the_posterior, known, rows, run

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")


def matching(out: Path, adjoint: str = "lean", **sections: Any) -> Trainer:
    prior = {"dtype": "float64"} | sections.pop("prior", {})
    return run(out, objective={"component": "adjoint_matching", "adjoint": adjoint}, prior=prior, **sections)


def pushed(trainer: Trainer, batch: Batch, adjoint: str) -> dict[str, Tensor]:
    """The gradient of one update on all steps."""
    batch = with_adjoint(trainer.sampler, batch, BETA, lean=adjoint == "lean")
    assert isinstance(trainer.objective, AimsStates)
    networks = {"prior": trainer.prior.as_prior}
    Regression(trainer.sampler, trainer.objective, BETA, networks).push({"posterior": batch}, None, 0)
    return gradients(trainer)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])  # whose last step is a map
def test_the_full_adjoint_gives_the_gradient_of_reward_backprop(scheduler: str, tmp_path: Path) -> None:
    trainer = matching(tmp_path, "full", reward=QUADRATIC, prior={"scheduler": scheduler})
    disturb(trainer)
    batch = trainer.sampler.draw([0] * 12, list(range(12)))  # in two micro-batches of 8 and 4
    Pathwise(trainer.sampler, BETA).push(batch, 4)
    expected = gradients(trainer)
    found = pushed(trainer, batch, "full")
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 0.1
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    lean = pushed(trainer, batch, "lean")
    assert any(not torch.allclose(lean[name], gradient, rtol=0.01) for name, gradient in expected.items())


def test_the_lean_adjoint_is_the_slope_of_the_reward_through_the_prior_s_chain(tmp_path: Path) -> None:
    """x_0 as a function of a state, by the prior's means in one graph and the recorded noise, whoever drew the trajectory."""
    trainer = matching(tmp_path, reward=QUADRATIC)
    disturb(trainer)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    chain = batch.trajectory
    found = with_adjoint(trainer.sampler, batch, BETA, lean=True).adjoint
    assert found is not None
    assert found.shape == (8, 4, 2)
    for i in range(4):
        start = chain.x[:, i + 1].detach().requires_grad_()
        x = start
        for j in range(i + 1, 4):
            through = torch.cat([chain.x[:, :j], x[:, None], chain.x[:, j + 1 :]], 1)
            mean = known(trainer).p.means(through)[:, j]
            x = mean + (chain.x[:, j + 1] - mean).detach()  # the recorded noise
        reward = trainer.sampler.reward(trainer.prior.pipe.denoiser.data_units(x), [""] * 8)
        (slope,) = torch.autograd.grad(reward.sum(), start)
        torch.testing.assert_close(found[:, i], -BETA * slope, rtol=1e-5, atol=1e-6)


def test_under_the_posterior_the_mean_adjoint_is_the_slope_of_log_f(tmp_path: Path) -> None:
    """-E[adjoint(x_s) given x_s] = grad log F(x_s), affine in x_s here: by least squares on the posterior's trajectories."""
    trainer = matching(tmp_path, reward=QUADRATIC)
    begin_at_the_posterior(trainer)
    trainer.sampler.micro_batch = 4096
    batch = with_adjoint(trainer.sampler, trainer.sampler.draw([0] * 4096, list(range(4096))), BETA, lean=True)
    tilt = known(trainer)
    assert batch.adjoint is not None
    i = 2  # the step after it leads to x_0, and no noise is between but that of one step
    x_s = batch.trajectory.x[:, i + 1].double()
    design = torch.cat([x_s, torch.ones(4096, 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, -batch.adjoint[:, i].double()).solution
    x = x_s.detach().requires_grad_()
    (slope,) = torch.autograd.grad(tilt.log_f[i + 1](x).sum(), x)
    assert float((fitted - slope).norm() / slope.norm()) < 0.1


def test_along_re_weighted_trajectories_of_the_prior_the_mean_aim_is_the_posterior_s_transition(tmp_path: Path) -> None:
    """E[aim given x_t] = E[x_s given x_t] under the posterior, affine in x_t here, with less noise than x_s has."""
    trainer = matching(tmp_path, reward=QUADRATIC)
    trainer.sampler.micro_batch = 8192
    batch = with_adjoint(trainer.sampler, trainer.sampler.draw([0] * 8192, list(range(8192))), BETA, lean=True)
    tilt, x = known(trainer), batch.trajectory.x.double()
    assert batch.adjoint is not None
    weight = torch.softmax(BETA * batch.reward.double(), 0)[:, None] ** 0.5
    for i in range(3):
        aim = tilt.p.means(x)[:, i] - float(batch.trajectory.std[i]) ** 2 * batch.adjoint[:, i].double()
        design = torch.cat([x[:, i], torch.ones(8192, 1)], 1)
        noise = {}
        for name, target in (("aim", aim), ("x_s", x[:, i + 1])):
            fitted = design @ torch.linalg.lstsq(weight * design, weight * target).solution
            noise[name] = float((weight * (target - fitted)).square().sum())
            if name == "aim":
                apart = (weight * (fitted - tilt.posterior.means(x)[:, i])).square().sum()
                shift = (weight * (tilt.p.means(x)[:, i] - tilt.posterior.means(x)[:, i])).square().sum()
                assert float(apart / shift) < 0.01
        assert noise["aim"] < noise["x_s"]


def test_with_a_linear_reward_nothing_pulls_at_the_posterior(tmp_path: Path) -> None:
    """Every single adjoint is the slope of log F there, so that even one trajectory says nothing more."""
    trainer = matching(tmp_path)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    assert float(pushed(trainer, batch, "lean")["offset"].abs().max()) > 0.1
    begin_at_the_posterior(trainer)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    for adjoint in ("lean", "full"):
        assert all(float(g.abs().max()) < 1e-5 for g in pushed(trainer, batch, adjoint).values())


BUFFER = {"component": "prior_buffer", "share": 0.5, "capacity": 512, "resample": True}


@pytest.mark.parametrize("behaviours", [[], [BUFFER], [{**BUFFER, "noised": True}]], ids=["own", "prior", "noised"])
def test_several_updates_learn_the_posterior(behaviours: list[dict[str, Any]], tmp_path: Path) -> None:
    train = {
        "iterations": 25,
        "group": 32,
        "micro_batch": 32,
        "lr": 0.05,
        "updates_per_iteration": 4,
        "gradient_steps": 2,
    }
    trainer = matching(tmp_path, train=train, behaviours=behaviours)
    trainer.fit()
    found, log_z = rows(trainer), known(trainer).log_z
    assert found[0]["elbo"] < log_z - 0.5
    assert mean(row["elbo"] for row in found[-5:]) == pytest.approx(log_z, abs=0.05)
    assert mean(row["ess"] for row in found[-5:]) > 0.95
