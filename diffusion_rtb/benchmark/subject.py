"""A model as a run has it: its prior loaded, the posterior attached, a sampler and a trainer around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from diffusion_rtb.behaviours._mixture import sources
from diffusion_rtb.benchmark.device import settled
from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.beta import make_beta
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Objective, Prior
from diffusion_rtb.run.posterior import attach_posterior
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import prepare_objective
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.update import Updates

__all__ = ["PROMPTS", "Subject", "config_of"]

PROMPTS = ("a cat", "a rocket", "a pizza", "a red heart")

UNLIMITED = 1e30
"""Nats of parity: on a device it is a result of the benchmark and no reason to stop."""


def config_of(part: Part, device: str | None) -> RunConfig:
    """The config of an ordinary run that a part is a piece of: one prompt, VarGrad, a reward that costs nothing."""
    assert part.row is not None
    dtype = "float32" if part.dtype == "tf32" else part.dtype
    prior = part.row.prior.model_dump() | {"dtype": dtype, "steps": part.steps}
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "prior": prior | ({} if device is None else {"device": device}),
            "posterior": part.row.posterior,
            "reward": {"component": "brightness"},
            "beta": 1.0,
            "prompts": {"list": list(PROMPTS)},
            "train": {
                "prompts_per_iteration": 1,
                "group": max(part.batch, 2),  # VarGrad compares at least two
                "micro_batch": part.batch,
                "parity_tolerance": UNLIMITED,
                "rounding_share": None,
            },
        }
    )


class Subject:
    """A loaded prior with its posterior, for all parts of the same model, dtype and steps.

    Args:
        part: The first of them.
        device: Where to run; the prior's choice by default.
    """

    def __init__(self, part: Part, device: str | None) -> None:
        start = perf_counter()
        self.key = self.key_of(part)
        self.device_asked = device
        config = config_of(part, device)
        self.prior: Prior = describe(config.prior, "prior").build()
        attach_posterior(config, self.prior)
        self.device = self.prior.device
        self.reward: Any = build(config.reward, "reward")
        settled(self.device)
        self.load_seconds = perf_counter() - start

    @staticmethod
    def key_of(part: Part) -> tuple[str, str, int]:
        """What parts that share a subject have in common."""
        return part.model, part.dtype, part.steps

    @property
    def network(self) -> nn.Module:
        """The network that carries the posterior."""
        trained = {id(parameter) for parameter in self.prior.parameters().values()}
        held = getattr(self.prior.pipe, "components", None) or vars(self.prior.pipe)
        modules = [module for module in held.values() if isinstance(module, nn.Module)]
        return next(module for module in modules if trained & {id(parameter) for parameter in module.parameters()})

    def rows(self, count: int) -> list[int]:
        """So many prompts, the same ones taking turns, by their rows."""
        return [i % len(PROMPTS) for i in range(count)]

    def prompts(self, count: int) -> list[str]:
        """The same by their texts."""
        return [PROMPTS[row] for row in self.rows(count)]

    def sampler(self, batch: int) -> Sampler:
        """Prior, posterior and reward on the prompts, `batch` trajectories at once."""
        return Sampler(self.prior, self.reward, PROMPTS, batch)

    def trainer(self, part: Part) -> Trainer:
        """The trainer of an ordinary run; it writes nothing unless told to save."""
        config = config_of(part, self.device_asked)
        objective: Objective = build(config.objective, "objective")
        sampler = self.sampler(config.train.micro_batch)
        prepare_objective(config, sampler, objective)
        processes = Processes.start(config.train.process_timeout)
        nowhere = Path(config.out) / config.name
        mixture, beta = sources(config), make_beta(config.beta)
        updates = Updates.of(config, sampler, objective, mixture)
        return Trainer(config, nowhere, sampler, objective, mixture, beta, processes, updates)

    def network_call(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the first network call of the pipeline, for `batch` samples."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _SeenEnough

        with _hooked(self.network, look), torch.no_grad():
            try:
                self.prior.pipe(**self.prior.arguments(self.prompts(batch)))
            except _SeenEnough:
                return seen[0]
        raise ValueError(f"{type(self.prior.pipe).__name__} evaluated no network that carries the posterior.")

    def forget_gradients(self) -> None:
        """Leave nothing behind for the next part."""
        for parameter in self.prior.parameters().values():
            parameter.grad = None


class _SeenEnough(Exception):  # noqa: N818 - no error: it ends a call that has said enough
    pass


@contextmanager
def _hooked(network: nn.Module, look: Any) -> Iterator[None]:
    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
