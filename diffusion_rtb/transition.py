r"""Mean and standard deviation of a scheduler's transition, asked of the scheduler itself.

Every stochastic diffusers scheduler computes x_s = mean(x_t, network output) + std·z with z from `torch.randn`. Evaluating
its own `step` with z replaced by a constant gives both without a formula per scheduler:

    mean = step(z = 0)                      std = (step(z = c) - step(z = 0)) / c

c is a large power of two, so that the difference loses no digits to the size of the mean. Both evaluations run in fp32
(or better) whatever the network's dtype, draw from no random generator, and leave the scheduler's state as it was.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["gaussian_kl", "normal_log_prob", "refuse_deterministic", "transition_mean", "transition_std"]

PROBE = 2.0**20
NO_NOISE = 1e-5  # no schedule steps this finely; noise from elsewhere than randn leaves about 1/PROBE here

REMEDIES = {
    "DDIMScheduler": "pass eta=1.0 to the pipeline",
    "DPMSolverMultistepScheduler": 'build it with algorithm_type="sde-dpmsolver++"',
    "FlowMatchEulerDiscreteScheduler": "build it with stochastic_sampling=True",
    "EulerDiscreteScheduler": "use EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)",
    "KDPM2DiscreteScheduler": "use EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)",
}
DEFAULT_REMEDY = "use DDIMScheduler.from_config(pipe.scheduler.config) and pass eta=1.0 to the pipeline"


class ConstantNoise(TorchFunctionMode):
    """Inside the block `torch.randn` and `torch.randn_like` answer `value` everywhere and draw from no generator."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = {k: v for k, v in (kwargs or {}).items() if k != "generator"}
        if func is torch.randn:
            size = options.pop("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            return torch.full(tuple(size), self.value, **options)
        if func is torch.randn_like:
            return torch.full_like(options.pop("input", args[0] if args else None), self.value, **options)
        return func(*args, **(kwargs or {}))


@contextmanager
def unchanged(scheduler: Any) -> Iterator[None]:
    """Put the scheduler's attributes back afterwards: multistep schedulers remember what `step` saw."""
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@functools.cache
def _takes_noise(step: Callable[..., Any]) -> bool:
    return "variance_noise" in inspect.signature(step).parameters


def _probe(
    scheduler: Any, step: Callable[..., Any], z: float, call: tuple[Any, ...], options: Mapping[str, Any]
) -> Any:
    """`step` with its noise replaced by z, in fp32 or better; the scheduler's state is put back."""
    model_output, timestep, sample, *rest = call
    options = {name: value for name, value in options.items() if name != "generator"}
    inputs = (_precise(model_output), timestep, _precise(sample), *rest)
    with unchanged(scheduler):
        if _takes_noise(type(scheduler).step) and len(rest) == 0:  # four times faster than intercepting torch.randn
            return step(*inputs, **options | {"variance_noise": torch.full_like(inputs[2], z)})
        with ConstantNoise(z):
            return step(*inputs, **options)


def in_place_of(method: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """`replacement` with the name and signature of `method`: pipelines look for `eta` in the signature of `step`."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return call


def previous_sample(output: Any) -> Tensor:
    """x_s from what a scheduler's `step` returned, a tuple or an output object."""
    x_s: Tensor = output[0] if isinstance(output, tuple) else output.prev_sample
    return x_s


def transition_mean(scheduler: Any, step: Callable[..., Any], *call: Any, **options: Any) -> Any:
    """The output of `step(*call, **options)` at z = 0, whose previous sample is the mean of x_t -> x_s; differentiable.

    Args:
        scheduler: Whose state is put back afterwards.
        step: Its own, unwrapped method.
        *call: model_output, timestep, sample, as the pipeline passes them.
        **options: eta, return_dict, …
    """
    return _probe(scheduler, step, 0.0, call, options)


def transition_std(scheduler: Any, step: Callable[..., Any], *call: Any, **options: Any) -> float:
    """The standard deviation of x_t -> x_s, the same for every dimension; 0 for a deterministic step.

    Raises:
        ValueError: the deviation differs between dimensions (a network that predicts its own variance).
    """
    model_output, timestep, sample, *rest = call
    one = (model_output[:1].detach(), timestep, sample[:1].detach(), *rest)
    with torch.no_grad():
        mean = previous_sample(_probe(scheduler, step, 0.0, one, options))
        std = (previous_sample(_probe(scheduler, step, PROBE, one, options)).double() - mean.double()) / PROBE
    low, high = float(std.min()), float(std.max())
    if max(abs(low), abs(high)) < NO_NOISE:
        return 0.0
    if not math.isclose(low, high, rel_tol=1e-4, abs_tol=1e-9):
        raise ValueError(
            f"{type(scheduler).__name__} has a different standard deviation in each dimension ({low:.3g} to {high:.3g}) at "
            f"timestep {timestep}: the network predicts its variance. Build the scheduler with variance_type='fixed_small'."
        )
    # Rounded to the trajectory's dtype, so that a deviation read back from it is the same number: replayed = recorded.
    return float(std.flatten().median().to(torch.promote_types(sample.dtype, torch.float32)))


def refuse_deterministic(scheduler: Any, timestep: Any) -> None:
    """Raise the error for a step without a density, naming what makes this scheduler stochastic."""
    name = type(scheduler).__name__
    raise ValueError(
        f"{name} makes a deterministic step at timestep {float(timestep):g} (std 0), so log p(x_s | x_t) does not exist. "
        f"To make it stochastic, {REMEDIES.get(name, DEFAULT_REMEDY)}."
    )


def normal_log_prob(
    x: Float[Tensor, "batch *dims"], mean: Float[Tensor, "batch *dims"], std: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " batch"]:
    r"""log N(x; mean, std²·I) = -|x - mean|² / (2·std²) - D·log(std·sqrt(2π)), summed over the D dimensions, in nats.

    The squared errors are fp32 or better; `dtype` is that of their sum. At D = 16,384 the two terms are near 1e4 nats each,
    where fp32 resolves 1e-3: differences of log-densities are taken in float64 for that reason.
    """
    z = (_precise(x) - mean) / std
    constant = z[0].numel() * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return -0.5 * z.square().flatten(1).sum(1, dtype=dtype) - constant


def gaussian_kl(
    mean_q: Float[Tensor, "batch *dims"], mean_p: Float[Tensor, "batch *dims"], std: float, dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """KL(q || p) = |mean_q - mean_p|² / (2·std²) of two transitions with the same deviation, summed over dims, in nats."""
    return 0.5 * ((_precise(mean_q) - mean_p) / std).square().flatten(1).sum(1, dtype=dtype)
