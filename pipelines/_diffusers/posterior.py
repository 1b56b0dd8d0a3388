"""What a posterior on a pipeline of diffusers can be: a LoRA in the denoiser, or trained weights of the denoiser itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipelines._diffusers.export import Loading, loading_full, loading_lora, write_lora
from pipelines._diffusers.full import (
    add_full,
    full_numbers,
    full_parameters,
    network_class,
    prior_weights,
    trained_names,
    write_full,
)
from pipelines._diffusers.lora import adapters_off, add_lora, lora_numbers, lora_parameters

__all__ = ["Full", "Lora", "Posterior", "posterior_of"]

Shapes = Mapping[str, Sequence[int]]


class Posterior(ABC):
    """How the denoiser carries its posterior; it holds no network."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """For the fingerprint."""

    def check(self, shapes: Shapes) -> None:
        """Refuse what a network whose weights have these shapes does not have; ValueError."""
        return

    @abstractmethod
    def numbers(self, shapes: Shapes) -> int:
        """How many are trained of a network whose weights have these shapes."""

    @abstractmethod
    def add(self, network: Any, seed: int) -> None:
        """Add it to a network, which computes the same as before."""

    @abstractmethod
    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    @abstractmethod
    def off(self, network: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the network is the prior. Nests."""

    @abstractmethod
    def write(self, pipe: Any, denoiser: str, folder: Path) -> None:
        """Write it for plain diffusers."""

    @abstractmethod
    def loading(self, pipe: Any, denoiser: str, dtype: str) -> Loading:
        """How plain diffusers loads that."""


@dataclass(frozen=True)
class Lora(Posterior):
    """Of these rank, alpha and targets; or one that was loaded, of which `source` says what is known."""

    rank: int = 8
    alpha: float = 8.0
    targets: Sequence[str] = ()
    source: Mapping[str, Any] | None = None

    @property
    def description(self) -> dict[str, Any]:
        own = {"rank": self.rank, "alpha": self.alpha, "target_modules": sorted(self.targets)}
        return own if self.source is None else dict(self.source)

    def numbers(self, shapes: Shapes) -> int:
        return lora_numbers(shapes, self.rank, self.targets)

    def add(self, network: Any, seed: int) -> None:
        add_lora(network, rank=self.rank, alpha=self.alpha, target_modules=self.targets, seed=seed)

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return lora_parameters(network)

    def off(self, network: nn.Module) -> AbstractContextManager[None]:
        return adapters_off(network)

    def write(self, pipe: Any, denoiser: str, folder: Path) -> None:
        write_lora(pipe, denoiser, folder, self.alpha / self.rank)

    def loading(self, pipe: Any, denoiser: str, dtype: str) -> Loading:
        return loading_lora(type(pipe), denoiser)


@dataclass(frozen=True)
class Full(Posterior):
    """All weights, or those of the modules whose names end in `targets`."""

    targets: Sequence[str] | None = None

    @property
    def description(self) -> dict[str, Any]:
        return {"full": True} | ({} if self.targets is None else {"target_modules": sorted(self.targets)})

    def check(self, shapes: Shapes) -> None:
        trained_names(shapes, self.targets)

    def numbers(self, shapes: Shapes) -> int:
        return full_numbers(shapes, self.targets)

    def add(self, network: Any, seed: int) -> None:
        add_full(network, self.targets)

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return full_parameters(network)

    def off(self, network: nn.Module) -> AbstractContextManager[None]:
        return prior_weights(network)

    def write(self, pipe: Any, denoiser: str, folder: Path) -> None:
        write_full(getattr(pipe, denoiser), folder / denoiser)

    def loading(self, pipe: Any, denoiser: str, dtype: str) -> Loading:
        return loading_full(network_class(getattr(pipe, denoiser)).__name__, denoiser, dtype)


def posterior_of(
    full: bool, rank: int | None, alpha: float | None, target_modules: Sequence[str] | None, targets: Sequence[str]
) -> Posterior:
    """What the arguments of `attach` ask for; `targets` are a LoRA's where none are given.

    Raises:
        ValueError: they do not go together.
    """
    if not full:
        rank, alpha = 8 if rank is None else rank, 8.0 if alpha is None else float(alpha)
        return Lora(rank, alpha, targets if target_modules is None else target_modules)
    given = {name: value for name, value in (("rank", rank), ("alpha", alpha)) if value is not None}
    if given:
        told = " and ".join(f"{name}: {value:g}" for name, value in given.items())
        raise ValueError(
            f"posterior: full: true beside {told}, which belong to a LoRA: full trains the weights themselves. Leave "
            f"{' and '.join(given)} out, or full."
        )
    return Full(target_modules)
