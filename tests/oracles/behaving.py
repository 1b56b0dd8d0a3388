"""Runs of the Gaussian prior with a reward whose posterior is known at every step, for the tests of behaviours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checkpoint import latest_checkpoint, load_checkpoint
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from pipelines._analytic.linear_gaussian import Tilt

LINEAR = {"linear": [1.0, 0.5]}
QUADRATIC = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}
BETA = 1.3


def run(out: Path, *, reward: dict[str, Any] = LINEAR, **sections: Any) -> Trainer:
    """A trainer of 4 steps in 2 dimensions; sections are merged into the defaults.

    `reward` is a component, or the arguments of a density.
    """
    data: dict[str, Any] = {
        "name": "known",
        "out": str(out),
        "prior": {
            "component": "gaussian",
            "mean": [1.0, -2.0],
            "covariance": [[2.0, 0.6], [0.6, 0.5]],
            "steps": 4,
            "schedule": {"signal": 1e-4},  # memoryless: log F(x_T) is log Z
        },
        "reward": reward if "component" in reward else {"component": "density", "density": reward},
        "beta": BETA,
        "prompts": {"list": [""]},
        "train": {
            "iterations": 4,
            "prompts_per_iteration": 1,
            "group": 8,
            "micro_batch": 8,
            "lr": 0.03,
            "grad_clip": 100.0,
            "checkpoint_every": 1000,
            "grid_every": 0,
        },
    }
    for key, value in sections.items():
        data[key] = data[key] | value if isinstance(data.get(key), dict) and isinstance(value, dict) else value
    return assemble(RunConfig.model_validate(data))


def known(trainer: Trainer, beta: float | None = None) -> Tilt:
    """The posterior in closed form."""
    reward = trainer.config.reward.model_dump()["density"]
    solved: Tilt = trainer.prior.solve(beta or trainer.config.beta.value, **reward)  # type: ignore[attr-defined]
    return solved


def begin_at_the_posterior(trainer: Trainer) -> None:
    """Exact for a linear reward: every residual is 0."""
    trainer.prior.set_posterior(known(trainer).best)  # type: ignore[attr-defined]


def gradient_of(prior: Prior) -> Tensor:
    """Of the posterior's parameters, those that have one, end to end."""
    return torch.cat([p.grad.flatten() for p in prior.parameters().values() if p.grad is not None])


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings."""
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the latest checkpoint by group and name, and beta; not the global generators, which no run uses."""
    latest = latest_checkpoint(trainer.folder / "checkpoints")
    assert latest is not None
    tensors, numbers = load_checkpoint(latest)
    flat = {
        f"{group}.{name}": tensor for group, held in tensors.items() if group != "rng" for name, tensor in held.items()
    }
    return flat | {"beta": torch.tensor(numbers["beta"], dtype=torch.float64)}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal to the last bit."""
    return sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    )
