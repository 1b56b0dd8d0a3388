r"""The rounding floor: what a network of reduced precision reports as KL(q || p) although q is p.

A posterior whose adapters are not 0 computes the prior's outputs by other numbers, which are rounded differently. However small the
change, the two means of a step differ by rounding, and their closed-form KL does not go away:

    floor = E sum_t |mean_q - mean_p|² / (2·std_t²)           q: the posterior with every parameter moved by 1e-4 at random; nats

(by 1e-5 where these are the network's own weights, all of which are moved: on the bundled prior in float32 that makes 6e-5 nats).

Training cannot remove it, and `kl`, `elbo`, `ess` and residuals contain it: log_q - log_p of a trajectory of the prior is not 0 but
-floor ± sqrt(2·floor). In float32 the same change makes about 1e-4 nats. `parity` sees none of it: the same network rounds alike.
What has been measured of it is in docs/precision.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from diffusion_rtb.config.sections import RunConfig
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.processes import Processes

__all__ = [
    "asked_tilt",
    "check_floor",
    "first_floor",
    "moved",
    "networks_of",
    "reduced_precision",
    "rounding_floor",
    "trained_networks",
]

SIZE = 1e-4
"""Of the change: next to nothing for the network (A of a LoRA is of the order of 0.1), and enough to round differently."""

OWN_SIZE = 1e-5
"""The same where the network's own weights are trained."""

WARN = 0.1
"""Share of `train.rounding_share` above which the floor is worth a warning."""


def reduced_precision(prior: Prior) -> str | None:
    """What the prior's network computes in, where that is less than float32: "bfloat16", "float16", "TF32"; else None."""
    networks = trained_networks(prior)
    for dtype in (torch.bfloat16, torch.float16):
        if any(parameter.dtype == dtype for network in networks for parameter in network.parameters()):
            return str(dtype).removeprefix("torch.")
    tf32 = torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    return "TF32" if prior.device.type == "cuda" and tf32 else None


def trained_networks(prior: Prior) -> list[nn.Module]:
    """The networks of a prior's pipeline that hold trained parameters."""
    trained = {id(parameter) for parameter in prior.parameters().values()}
    return [module for module in networks_of(prior.pipe).values() if trained & {id(p) for p in module.parameters()}]


def networks_of(pipe: object) -> dict[str, nn.Module]:
    """The networks of a pipeline by the names of its parts; itself by "" where it is one."""
    held = getattr(pipe, "components", None) or vars(pipe)
    return {name: part for name, part in (*held.items(), ("", pipe)) if isinstance(part, nn.Module)}


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], size: float = SIZE) -> Iterator[None]:
    """Inside the block every parameter is off by `size` times a standard normal number; the same ones each time."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def rounding_floor(sampler: Sampler, own: Batch) -> float:
    """The floor on one micro-batch of `own`, while the posterior is the prior still; nats each. Twice their network calls."""
    part = replace(own[sampler.chunks(len(own))[0]], log_q=None, log_p=None, mean_p=None, kl=None)
    size = OWN_SIZE if "full" in (sampler.prior.fingerprint().get("adapter") or {}) else SIZE
    with torch.random.fork_rng(), moved(sampler.prior.parameters(), size):
        kl = sampler.with_kl(part).kl
    assert kl is not None
    return float(kl.sum(1).mean())


def asked_tilt(config: RunConfig, own: Batch) -> float:
    """How far the posterior is asked to go: the nats of `kl_budget`, or beta·sd(r) with sd taken within each prompt."""
    if config.beta.kl_budget is not None:
        return config.beta.kl_budget.nats
    groups = [own.reward[own.prompt == row].double() for row in torch.unique(own.prompt)]
    variance = torch.stack([group.var(correction=0) for group in groups]).mean()
    return config.beta.value * float(variance.sqrt())


def first_floor(sampler: Sampler, own: Batch, config: RunConfig, processes: Processes) -> dict[str, float]:
    """The metric `rounding_floor` of iteration 0, judged by `check_floor`; none where the network computes in full precision.

    The posterior is the prior still; all processes judge the mean over all.
    """
    precision = reduced_precision(sampler.prior)
    if precision is None:
        return {}
    numbers = torch.tensor([rounding_floor(sampler, own), asked_tilt(config, own)], device=own.reward.device)
    floor, tilt = processes.mean([numbers])[0].tolist()
    check_floor(floor, tilt, config.train.rounding_share, precision)
    return {"rounding_floor": floor}


def check_floor(floor: float, tilt: float, share: float | None, precision: str) -> None:
    """Refuse a run whose numbers would be rounding; warn where rounding is much of them.

    Args:
        floor: See `rounding_floor`; nats.
        tilt: See `asked_tilt`; nats. 0, of rewards that are all alike, asks for nothing and is not judged.
        share: `train.rounding_share`; None: neither.
        precision: Of the network, for the message.

    Raises:
        ValueError: the floor is more than `share` of the tilt.
    """
    if share is None or tilt == 0 or floor <= WARN * share * tilt:
        return
    found = (
        f"The {precision} network has a rounding floor of {floor:.3g} nats: prior and posterior differ by as much however little "
        f"is learned, and the tilt asked for (kl_budget, or beta·sd of the reward) is {tilt:.3g} nats. kl, elbo and ess contain it"
    )
    remedy = "Load the prior in float32, or in float16 rather than bfloat16 (64 times less), or ask for more: see docs/precision.md"
    if floor > share * tilt:
        raise ValueError(
            f"{found}: more than train.rounding_share={share:g} of the tilt. {remedy}, or raise that share."
        )
    warnings.warn(f"{found}. {remedy}.", stacklevel=2)
