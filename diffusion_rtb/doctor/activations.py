"""What the gradient of one micro-batch takes beside the weights: measured at a small one, scaled, and measured at the real one.

bytes(n) = bytes(1) + (n − 1) · (bytes(2) − bytes(1))        n trajectories; one step, as all others look alike
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_rtb.chain.reversal import Reversal
from diffusion_rtb.chain.rollout import visit_states
from diffusion_rtb.doctor.sizes import GraphBytes
from diffusion_rtb.reward_check.measures import peak_memory
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.rounding_floor import networks_of
from diffusion_rtb.training.updates.gradient import push_back

__all__ = ["activation_bytes", "scaled"]

MIB = 2**20


def activation_bytes(sampler: Sampler, batch: Batch, count: int) -> int:
    """Bytes of the gradient of one step of `count` trajectories, as training takes it, by torch's own counting.

    An accelerator that counts says the most that was allocated beyond what was there before; elsewhere it is what autograd holds
    for backward, without temporary results.

    Args:
        sampler: Holds the posterior; its micro-batch is `count` or more.
        batch: Trajectories, `count` or more.
        count: How many of them.
    """
    prior, part = sampler.prior, batch[:count]
    gradient = _of_states(sampler, part) or _of_density(sampler, part)
    module: Any = None if prior.device.type == "cpu" else torch.get_device_module(prior.device)
    try:
        if hasattr(module, "max_memory_allocated"):
            with peak_memory(prior.device) as memory:
                gradient()
            return round(memory.mib * MIB)
        weights = [tensor for network in networks_of(prior.pipe).values() for tensor in network.state_dict().values()]
        return GraphBytes([*weights, part.trajectory.x]).during(gradient)
    finally:
        for parameter in prior.parameters().values():
            parameter.grad = None


def _of_density(sampler: Sampler, part: Batch) -> Callable[[], object]:
    """The gradient of a step's log-density."""
    step = int(part.trajectory.stochastic.nonzero()[0])
    cotangent = torch.ones(part.trajectory.log_prob.shape, dtype=torch.float64, device=sampler.prior.device)
    return lambda: push_back(sampler, [part], cotangent, steps=[step])


def _of_states(sampler: Sampler, part: Batch) -> Callable[[], object] | None:
    """That of the mean of a step which is not the sampler's own; None where it is."""
    prior, states = sampler.prior, part.trajectory.to(sampler.prior.device)
    reversal = Reversal.where_needed(prior.pipe.scheduler, part.trajectory)
    if reversal is None:
        return None
    texts, mean = sampler.texts(part.prompt), reversal.mean
    return lambda: visit_states(
        prior, texts, states, [0], lambda at: at.mean.sum().backward(), grad=True, maps=True, mean=mean
    )


def scaled(one: int, two: int, count: int) -> int:
    """Bytes of `count` trajectories by those of one and of two."""
    return one + (count - 1) * max(0, two - one)
