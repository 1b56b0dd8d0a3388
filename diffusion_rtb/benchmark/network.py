"""One call of the network that carries the posterior: floating-point operations, seconds and memory, without and with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_rtb.benchmark.device import counted, peak_memory, shared, timed, typical
from diffusion_rtb.benchmark.plan import Part

if TYPE_CHECKING:
    from diffusion_rtb.benchmark.subject import Subject

__all__ = ["first_of", "measure_network"]


def measure_network(subject: Subject, part: Part, rate: float | None) -> dict[str, Any]:
    """A batch as the pipeline itself calls it; the gradient is that of the posterior."""
    network = subject.network
    args, kwargs = subject.network_call(part.batch)

    def forward() -> None:
        with torch.no_grad():
            network(*args, **kwargs)

    def both() -> None:
        first_of(network(*args, **kwargs)).float().square().mean().backward()
        subject.forget_gradients()

    trained = {id(parameter) for parameter in subject.prior.parameters().values()}
    flop, flop_both = counted(forward), counted(both)
    peak = peak_memory(forward, subject.device)
    peak_both = peak_memory(both, subject.device)
    seconds, seconds_both = (timed(action, subject.device) for action in (forward, both))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in trained),
        "trained": sum(parameter.numel() for parameter in subject.prior.parameters().values()),
        "dims": list(subject.prior.dims),
        "load_seconds": subject.load_seconds,
        "flop": flop,
        "flop_with_gradient": flop_both,
        "runs": len(seconds),
        "seconds": typical(seconds),
        "seconds_with_gradient": typical(seconds_both),
        "peak_memory": peak,
        "peak_memory_with_gradient": peak_both,
    } | shared(flop, typical(seconds), rate)


def first_of(output: Any) -> Tensor:
    """What a network of diffusers answers, whether as a tuple or as an object."""
    found = output[0]
    assert isinstance(found, Tensor)
    return found
