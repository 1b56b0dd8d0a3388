"""What is asked of every way to steer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack, runtime_checkable

import torch

from diffusion_rtb.steering._aim import Aim, Kind

if TYPE_CHECKING:
    from diffusion_rtb.steering._particles import Particles

__all__ = ["Drawing", "Method"]


class Drawing(TypedDict, total=False):
    """How the rows of a call are drawn; every method hands it on to its `Particles`."""

    seeds: Sequence[int] | None
    """One per group of `particles` rows, of the choices among them; None: 0, 1, …."""
    generators: Sequence[torch.Generator] | None
    """See `TrajectoryRecorder`."""
    as_prior: Callable[[], AbstractContextManager[None]] | None
    """The recorder's `prior`."""
    means: bool
    """Keep the mean of every transition, see `Particles.means`; as much memory again as the states take."""


@runtime_checkable
class Method(Protocol):
    """Settings of one way to steer a stock pipeline; a class that names it as its base writes `around`.

        with SMC(particles=16).around(pipe, Aim(reward, beta=2.0)) as chain:
            images = pipe(["a cat"] * 16, eta=1.0).images
        chain.log_z, chain.trajectory

    Its settings are the annotated arguments of its constructor.
    """

    particles: int = 1
    """Adjacent rows of a call that belong together: chains of one prompt."""
    kept: int = 1
    """Of them that are samples in the end, the first ones; the others repeat them."""
    of_posterior: bool = False
    """It steers a trained posterior, not the prior."""
    value: Kind = "reward"
    """What a state is weighed by."""
    weighs: bool = False
    """It weighs states on the way by `value`, so that "reward" and "both" need an estimate of x_0 from x_t."""
    needs_noise: bool = True
    """It needs steps with noise."""

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """A block in which calls of `pipe` are steered, and recorded.

        Args:
            pipe: A stock pipeline; its scheduler is wrapped, and put back on leaving.
            aim: What to steer towards.
            **drawing: See `Drawing`.
        """
