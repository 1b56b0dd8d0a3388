"""What a training costs: seconds, calls of the network, images scored, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffusion_rtb.config.load import ConfigError
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.reward_check.measures import peak_memory
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.counted import RewardCalls, counted

__all__ = ["COSTS", "GRADIENT", "TITLES", "Budget", "Cost", "Meter", "denoisers"]

Cost = Literal["seconds", "cpu_seconds", "network_calls", "reward_calls"]
COSTS: tuple[Cost, ...] = get_args(Cost)
TITLES: Mapping[Cost, str] = {
    "seconds": "training seconds",
    "cpu_seconds": "training CPU seconds",
    "network_calls": "network calls",
    "reward_calls": "reward calls",
}

GRADIENT = 3
"""Calls that one with its gradient counts as: the backward pass takes about two more."""

WATCHED = 3
"""Iterations, after the warm-up, whose memory is watched: later ones take the same, and watching takes time."""


@dataclass(frozen=True)
class Budget:
    """What one training may cost; the iteration that reaches it is the last."""

    cost: Cost
    amount: float

    @staticmethod
    def of(text: str) -> Budget:
        """From "network_calls=200000".

        Raises:
            ConfigError: it is something else.
        """
        name, _, amount = text.partition("=")
        try:
            number = float(amount)
        except ValueError:
            number = 0.0
        if name not in COSTS or not 0 < number < float("inf"):
            raise ConfigError(
                f"A budget is one of {', '.join(COSTS)} with a positive number, e.g. network_calls=200000; got {text!r}."
            )
        return Budget(name, number)


class Meter:
    """Counts from `go` to `stop`, and again.

    A network call is one sample through the denoiser, `GRADIENT` of them where autograd follows it; with guidance a step takes two.
    The small value networks of objectives do not count. A reward call is one image.

    Args:
        sampler: With prior, posterior and reward of the training.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._device = sampler.prior.device
        self._networks = denoisers(sampler.prior)
        self._rewards = RewardCalls(sampler.reward)
        self._network_calls = 0
        self._before: dict[str, float] = {}
        self._seconds = dict.fromkeys(("seconds", "cpu_seconds"), 0.0)
        self.memory = 0.0
        """MiB that an iteration took at most beyond what the process had."""
        self._open: ExitStack | None = None

    @property
    def spent(self) -> dict[str, float]:
        """By the names of `COSTS`; network calls are absent where no network could be told."""
        found = self._seconds | {"reward_calls": float(self._rewards.count)}
        found |= {"network_calls": float(self._network_calls)} if self._networks else {}
        return {name: value + self._before.get(name, 0.0) for name, value in found.items()}

    def resume(self, spent: Mapping[str, float]) -> None:
        """Go on from what was spent before an interruption."""
        self._before = {name: spent[name] for name in COSTS if name in spent}
        self.memory = spent.get("memory", 0.0)

    def go(self, *, memory: bool) -> None:
        """Begin to count, the memory too if asked."""
        stack = ExitStack()
        for network in self._networks:
            stack.callback(network.register_forward_hook(self._called, with_kwargs=True).remove)
        stack.enter_context(counted(self._rewards))
        if memory:
            stack.enter_context(self._watched())
        stack.callback(self._took, (perf_counter(), process_time()))
        self._open = stack

    def stop(self) -> None:
        """Count no further; nothing if nothing is counted."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _took(self, since: tuple[float, float]) -> None:
        self._seconds["seconds"] += perf_counter() - since[0]
        self._seconds["cpu_seconds"] += process_time() - since[1]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with peak_memory(self._device) as found:
            yield
        self.memory = max(self.memory, found.mib)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(output))
        self._network_calls += _rows((*args, *kwargs.values())) * (GRADIENT if with_gradient else 1)


def denoisers(prior: Prior) -> list[nn.Module]:
    """The networks of the prior's pipeline that hold what is trained."""
    trained = {id(parameter) for parameter in prior.parameters().values()}
    parts = [part for part in vars(prior.pipe).values() if isinstance(part, nn.Module)]
    return [part for part in parts if any(id(parameter) in trained for parameter in part.parameters())]


def _rows(inputs: tuple[Any, ...]) -> int:
    """How many samples a network is given: the rows of its first batch, a tensor or a list of one tensor for each sample."""
    for value in inputs:
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            return len(value)
    return 0


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]
