"""Prior and posterior mixed at every step, with a weight of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_rtb.needs import instead
from diffusion_rtb.steering._aim import Aim
from diffusion_rtb.steering._method import Drawing, Method
from diffusion_rtb.steering._particles import Particles

__all__ = ["RLG", "mixed"]

NETWORKS = ("unet", "transformer", "transformer_2", "denoiser")
"""What diffusers calls the network of a denoising loop."""


class RLG(Method):
    r"""The network answers e_p + weight·(e_q - e_p), e_p the prior's answer and e_q the posterior's.

    weight 0 is the prior, 1 the posterior, and between, or above, stands for p(x)·exp(weight·beta·r(x)) / Z: strengths without
    training. The scores at the end of the chain are those of that density. Those of its noised versions are not mixtures of the
    noised scores, so it is exact where p and q differ by a linear r of a Gaussian, and elsewhere approximate.

    Of guided networks the guided answers are mixed, as guidance is linear in what it mixes; `guidance_rescale` is not. One more
    network call for each.

    Args:
        weight: 0 or more.

    Source: 2025, https://arxiv.org/abs/2508.21016
    """

    of_posterior = True

    def __init__(self, weight: float = 1.5) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight}: 0 is the prior, 1 the posterior, more goes beyond; give 0 or more.")
        self.weight = weight

    def around(self, pipe: Any, aim: Aim, **drawing: Unpack[Drawing]) -> Particles:
        """See `Method`; without `as_prior` the pipeline's LoRA is what makes the posterior.

        Raises:
            ValueError: the pipeline has no network that is known, or, without `as_prior`, no LoRA to switch off.
        """
        networks = [found for name in NETWORKS if isinstance(found := getattr(pipe, name, None), nn.Module)]
        if not networks:
            raise ValueError(
                f"{type(pipe).__name__} has no network called {', '.join(NETWORKS)}, so prior and posterior cannot be mixed in it. "
                f"{instead('posterior', 'steering')}"
            )
        off = drawing.get("as_prior") or partial(_without_lora, pipe)
        blocks = [partial(mixed, network, off, self.weight) for network in networks]
        return _Mixed(
            pipe.scheduler,
            aim,
            blocks,
            size=1,
            choose=_itself,
            every=None,
            weighs=False,
            **drawing,
        )


class _Mixed(Particles):
    """Particles of a pipeline whose networks are mixed inside the block."""

    def __init__(
        self, scheduler: Any, aim: Aim, blocks: Sequence[Callable[[], AbstractContextManager[None]]], **settings: Any
    ) -> None:
        super().__init__(scheduler, aim, **settings)
        self._blocks, self._inside = blocks, ExitStack()

    def __enter__(self) -> Particles:
        for block in self._blocks:
            self._inside.enter_context(block())
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()
        super().__exit__(kind, error, trace)


@contextmanager
def mixed(network: nn.Module, as_prior: Callable[[], AbstractContextManager[None]], weight: float) -> Iterator[None]:
    """Inside the block the network answers e_p + weight·(e_q - e_p)."""
    own, forward = vars(network).get("forward"), network.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        of_q = forward(*args, **kwargs)
        with as_prior():
            of_p = forward(*args, **kwargs)
        q, p = output_of(of_q), output_of(of_p)
        return with_output(of_q, p + weight * (q - p))

    network.forward = answer
    try:
        yield
    finally:
        del network.forward
        if own is not None:  # somebody else's, such as accelerate's
            network.forward = own


def output_of(answer: Any) -> Tensor:
    """What a network predicts, from a tensor, a tuple or an object with `sample`."""
    found: Tensor = answer if isinstance(answer, Tensor) else answer[0] if isinstance(answer, tuple) else answer.sample
    return found


def with_output(answer: Any, output: Tensor) -> Any:
    """The same form with another prediction."""
    if isinstance(answer, Tensor):
        return output
    return (output, *answer[1:]) if isinstance(answer, tuple) else type(answer)(sample=output)


@contextmanager
def _without_lora(pipe: Any) -> Iterator[None]:
    """Inside the block a stock pipeline is the one that its LoRA was loaded into."""
    if not (hasattr(pipe, "get_active_adapters") and pipe.get_active_adapters()):
        raise ValueError(
            f"{type(pipe).__name__} has no active LoRA, so prior and posterior are one: load one, or give as_prior, a block in "
            "which the network is the prior."
        )
    pipe.disable_lora()
    try:
        yield
    finally:
        pipe.enable_lora()


def _itself(log_w: Float[Tensor, " size"], generator: torch.Generator, end: bool) -> Int[Tensor, " size"] | None:
    return None
