"""Gradients through half-precision networks: those of float32, whatever the size of the cotangents and the unit of the reward."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.normal import power_of_two
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.gradient import (
    check_trainable,
    clip_gradients,
    descend,
    loss_of,
    push_back,
)
from tests.oracles.tiny import save_tiny
from tests.training.test_trainer import perturb, run_config

COSINE = {"float32": 1 - 1e-9, "float16": 0.999, "bfloat16": 0.98}
"""To the gradient in float32, with the same states. bfloat16 has 8 bits, and no scale helps it."""

SCALES = [1e-30, 1.0, 1e30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("half") / "prior")


def trainer(folder: Path, out: Path, dtype: str, prior: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    """Off the prior, with guidance."""
    config = run_config(folder, out, **sections)
    chosen = {"dtype": dtype, "guidance": 3.0, "tilted_prior": "guided"} | (prior or {})
    made = assemble(config.model_copy(update={"prior": config.prior.model_copy(update=chosen)}))
    perturb(made)
    return made


def drawn(made: Trainer) -> Batch:
    return made.sampler.completed(made.sampler.draw([0, 1, 2, 0], [1, 2, 3, 4]))


def in_float32(part: Batch) -> Batch:
    mean_p = None if part.mean_p is None else part.mean_p.float()
    return replace(part, trajectory=replace(part.trajectory, x=part.trajectory.x.float()), mean_p=mean_p)


def gradient(made: Trainer) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in made.prior.parameters().values() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / a.norm() / b.norm())


@pytest.mark.parametrize("dtype", COSINE)
def test_gradients_are_those_of_float32_at_any_size_of_the_cotangents(dtype: str, folder: Path, tmp_path: Path) -> None:
    exact, made = trainer(folder, tmp_path / "exact", "float32"), trainer(folder, tmp_path / "half", dtype)
    part = drawn(made)
    cotangent = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    push_back(exact.sampler, [in_float32(part)], cotangent)
    expected = gradient(exact)
    # Parts and micro-batches share one scale: the second part's own would be 1,000 times smaller.
    rows = torch.tensor([1.0, 1.0, 1e-3, 1e-3], dtype=torch.float64)[:, None]
    push_back(exact.sampler, [in_float32(part)], rows * cotangent)
    uneven = gradient(exact)
    for scale in SCALES:
        push_back(made.sampler, [part], scale * cotangent)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.prior.parameters().values())
        assert cosine(gradient(made), expected) > COSINE[dtype]
        assert float(gradient(made).norm() / scale / expected.norm()) == pytest.approx(1, abs=0.05)
        push_back(made.sampler, [part[[0, 1]], part[[2, 3]]], scale * rows * cotangent)
        assert cosine(gradient(made), uneven) > COSINE[dtype]


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Trainer, Batch]:
    """The same posterior in float32 and float16, trajectories of it with all densities, and no clipping."""
    out = tmp_path_factory.mktemp("pair")
    train = {"parity_tolerance": 1e9, "grad_clip": 1e30, "lr": 1e-30, "gradient_steps": None}
    exact, half = (trainer(folder, out / dtype, dtype, train=train) for dtype in ("float32", "float16"))
    part = half.sampler.with_kl(half.sampler.draw([0, 0, 0, 0], [1, 2, 3, 4]))
    return exact, half, part


@pytest.mark.parametrize(
    "objective", [RTB(), RTB("learned"), TrustPCL(), TrustPCL(2), ReinforceKL(), GRPO(), DPOK("gaussian")]
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_an_update_has_the_gradient_of_float32_at_any_scale_of_the_reward(
    objective: Any, scale: float, pair: tuple[Trainer, Trainer, Batch]
) -> None:
    """r·scale at beta/scale, one posterior; and r·scale at the same beta, up to 1e8 nats."""
    exact, half, part = pair
    part = replace(part, reward=scale * part.reward)
    for beta in {0.5 / scale, 0.5}:
        gradients = []
        for made, own in ((exact, in_float32(part)), (half, part)):
            made.objective = deepcopy(objective)
            made.objective.prepare(3, made.prior.dims, 16)
            terms, _ = loss_of(made.sampler, made.objective, [own], beta)
            made.updates.backward([own], terms, 0, 0)
            descend(made.optimizer, made.config.train, 0, made.processes)
            gradients.append(gradient(made))
        assert cosine(*gradients) > COSINE["float16"]
        assert float(gradients[0].norm() / gradients[1].norm()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", COSINE)
def test_where_q_is_p_the_kl_has_no_gradient(dtype: str, folder: Path, tmp_path: Path) -> None:
    """The prior's means are kept as they were computed: rounded to bfloat16 they would pull the posterior anywhere."""
    made = trainer(folder, tmp_path, dtype)
    for name, parameter in made.prior.parameters().items():
        if ".lora_B." in name:
            parameter.data.zero_()
    part = made.sampler.with_kl(made.sampler.draw([0, 1], [1, 2]))
    assert part.kl is not None
    assert float(part.kl.abs().max()) == 0
    zero = torch.zeros(2, 4, dtype=torch.float64)
    push_back(made.sampler, [part], zero, torch.ones_like(zero))
    assert float(gradient(made).abs().max()) == 0


def test_a_step_of_tiny_deviation_does_not_overflow(folder: Path, tmp_path: Path) -> None:
    """dlog_q/dmean is 1/std of the noise: at eta 1e-3 it leaves float16 at a cotangent of 1, and not at 2^-10."""
    made = trainer(folder, tmp_path, "float16", {"eta": 1e-3})
    part = made.sampler.draw([0, 1], [1, 2])
    push_back(made.sampler, [part], torch.ones(2, 4, dtype=torch.float64))
    found = gradient(made)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) > 1e3


def test_cotangents_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, "float32")
    cotangent = torch.ones(4, 4, dtype=torch.float64)
    cotangent[1, 2] = float("nan")
    push_back(made.sampler, [drawn(made)], cotangent)
    with pytest.raises(ValueError, match="gradient norm is nan at iteration 3"):
        clip_gradients(made.prior.parameters().values(), 1.0, 3)


def test_half_precision_parameters_are_refused(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, "float16")
    parameters = made.prior.parameters()
    check_trainable(parameters)
    name = sorted(parameters)[0]
    parameters[name].data = parameters[name].data.half()
    with pytest.raises(
        ValueError, match=r"1 trainable parameters are half precision, first .*torch.float16.*\.float\(\)"
    ):
        check_trainable(parameters)


def test_power_of_two() -> None:
    values = [3.0, 1.0, 0.99, 1e-8, 1e8, 0.0, float("inf"), float("nan"), 5e-324]
    found = [2.0, 1.0, 0.5, 2.0**-27, 2.0**26, 1.0, 1.0, 1.0, 5e-324]
    assert [power_of_two(value) for value in values] == found
