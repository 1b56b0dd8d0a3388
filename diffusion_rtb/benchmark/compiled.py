"""torch.compile of the network: what it costs once, what it saves per call, and whether replay still meets the rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_rtb.benchmark.device import settled, timed, typical
from diffusion_rtb.benchmark.plan import Part
from diffusion_rtb.chain.rollout import rollout, score

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["measure_compiled"]


def measure_compiled(subject: Subject, part: Part, backend: str = "inductor") -> dict[str, Any]:
    """The posterior's network on one batch without gradients, eager and compiled, and the parity of a compiled chain in nats."""
    args, kwargs = subject.network_call(part.batch)
    network, device = subject.network, subject.device

    def forward() -> None:
        with torch.no_grad():
            network(*args, **kwargs)

    forward()
    eager = typical(timed(forward, device))
    with _compiled(network, backend):
        start = perf_counter()
        forward()
        settled(device)
        first = perf_counter() - start
        compiled = typical(timed(forward, device))
        prompts = subject.prompts(part.batch)
        trajectory = rollout(subject.prior, prompts, list(range(part.batch)))
        gap = (score(subject.prior, prompts, trajectory) - trajectory.log_prob).abs().max()
    return {"first_call": first, "seconds": compiled, "seconds_eager": eager, "parity": float(gap)}


@contextmanager
def _compiled(network: nn.Module, backend: str) -> Iterator[None]:
    """Inside the block the network is compiled, in place: whoever holds it calls the compiled one."""
    network.compile(backend=backend)
    try:
        yield
    finally:
        network._compiled_call_impl = None
        torch.compiler.reset()
