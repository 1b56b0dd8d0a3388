"""Other values of the posterior's parameters: those of an older posterior, or their moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion_rtb.interfaces import Prior

__all__ = ["Copy", "averaged"]


def averaged(ema: float, iteration: int) -> float:
    """What stays of a moving average after this iteration: min(ema, (1 + i) / (10 + i)), so that what it began as is forgotten."""
    return min(ema, (1 + iteration) / (10 + iteration))


class Copy:
    """A second set of numbers for the posterior, of which the network can be made to use either.

        held <- kept·held + (1 - kept)·parameters

    They lie where the parameters were when the copy was made, and begin as these. There are never more than these two sets.

    Args:
        prior: Whose posterior it is.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.held = {name: parameter.detach().clone() for name, parameter in prior.parameters().items()}

    @torch.no_grad()
    def move(self, kept: float) -> None:
        """Go towards the parameters of the moment; with kept 0 be these, with 1 stay."""
        for name, parameter in self.prior.parameters().items():
            held = self.held[name]
            held.lerp_(parameter.detach().to(held), 1 - kept)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Inside the block the posterior is the copy; its own numbers come back afterwards, to the last bit."""
        parameters = self.prior.parameters()
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.held[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what a checkpoint has."""
        for name, held in self.held.items():
            held.copy_(tensors[name])
